"""The names of Apache Beam that pairsift uses and Beam does not document. All of them are here, each with the reason.

Beam may change them in any release. `tests/pipeline/runners/test_beam_internals.py` checks each against the installed
release, so a new one is tried by running that test.
"""

from __future__ import annotations

import abc
import contextlib
import contextvars
import functools
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import grpc
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_job_api_pb2, beam_runner_api_pb2
from apache_beam.runners.portability import abstract_job_service
from apache_beam.runners.portability.fn_api_runner import FnApiRunner, worker_handlers
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    ControlFuture,
    ExternalWorkerHandler,
    GrpcServer,
    GrpcWorkerHandler,
    WorkerHandler,
)
from apache_beam.runners.portability.local_job_service import BeamJob, LocalJobServicer
from apache_beam.runners.portability.portable_runner import JobServiceHandle, PortableRunner
from apache_beam.runners.worker import worker_pool_main
from apache_beam.transforms import core
from google.protobuf import json_format

from pipeline.runners.hosts import is_this_host

if TYPE_CHECKING:
    from apache_beam.runners import DataflowRunner

__all__ = [
    "ExternalWorkerHandler",
    "FnApiRunner",
    "GrpcWorkerHandler",
    "JobServiceHandle",
    "LocalJobServicer",
    "PortableJob",
    "PortableRunner",
    "WorkerHandler",
    "connection_thread",
    "dataflow_bytes",
    "has_pool_elsewhere",
    "job_of_service",
    "memoise_inspection",
    "pending_answers",
    "pool_address",
    "without_time_limit",
    "workers_of_job",
]

# The module `apache_beam.runners.portability` is undocumented as a whole. Its classes are used for these reasons:
# FnApiRunner          the local runner. Beam's DirectRunner first tries to download another one.
# WorkerHandler        `register_environment` replaces Beam's handlers of worker processes, which do not notice a death.
# GrpcWorkerHandler,   the base classes of the handlers that take their place.
# ExternalWorkerHandler
# LocalJobServicer     the base class of the job service.
# PortableRunner,      `create_job_service` and `create_job_service_handle` are overridden, to run that service in this
# JobServiceHandle     process and to wait for a job of any length.


def _arguments_memoised(inspect: Any) -> Any:
    """Wrap `get_function_args_defaults` of Beam so that each function is inspected once."""
    known: weakref.WeakKeyDictionary[Any, dict[bool, Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(inspect)
    def arguments(function: Any) -> tuple[list[str], list[Any]]:
        bound = isinstance(function, types.MethodType)
        try:
            found = known.setdefault(function.__func__ if bound else function, {})
        except TypeError:  # a function of C code may have no weak references
            return inspect(function)
        if bound not in found:
            found[bound] = inspect(function)
        names, defaults = found[bound]
        return list(names), list(defaults)

    return arguments


def _views_memoised(view_as: Any) -> Any:
    """Wrap `PipelineOptions.view_as` so that each view of an options object is built once. Views share their values."""
    known: weakref.WeakKeyDictionary[PipelineOptions, dict[type, Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(view_as)
    def memoised(options: PipelineOptions, view: type) -> Any:
        found = known.setdefault(options, {})
        if view not in found:
            found[view] = view_as(options, view)
        return found[view]

    return memoised


@functools.cache
def memoise_inspection() -> None:
    """Make Beam inspect each function, and parse each view of the options, once per process.

    Beam inspects every method of every DoFn dozens of times and builds a command-line parser for every step. Together
    they took almost half of the CPU time of a run with nothing to do (7.5 s, then 4.1 s, on one machine).
    """
    core.get_function_args_defaults = _arguments_memoised(core.get_function_args_defaults)
    PipelineOptions.view_as = _views_memoised(PipelineOptions.view_as)


_EVERY_INTERFACE = "[::]"
_listens_on = contextvars.ContextVar("listens_on", default="localhost")


class _Grpc(types.ModuleType):
    """Takes the place of the module `grpc` in modules of Beam, whose servers then listen on this machine only.

    The servers of runner, worker pool and artifacts carry pickled functions and have no authentication, and Beam binds
    them to every interface.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(grpc, name)

    @staticmethod
    def server(*settings: Any, **named: Any) -> grpc.Server:
        """A server that binds every interface only in `_on_every_interface`."""
        server = grpc.server(*settings, **named)
        bind = server.add_insecure_port
        server.add_insecure_port = lambda address: bind(address.replace(_EVERY_INTERFACE, _listens_on.get(), 1))
        return server


class _RunnerServer(GrpcServer):
    """The servers that workers connect to. Workers of a pool on another machine could not reach loopback."""

    def __init__(self, state: Any, provision_info: Any, worker_manager: Any) -> None:
        with _on_every_interface(has_pool_elsewhere(worker_manager._environments.values())):
            super().__init__(state, provision_info, worker_manager)


@contextlib.contextmanager
def _on_every_interface(whether: bool) -> Iterator[None]:
    token = _listens_on.set(_EVERY_INTERFACE if whether else _listens_on.get())
    try:
        yield
    finally:
        _listens_on.reset(token)


def has_pool_elsewhere(environments: Iterable[beam_runner_api_pb2.Environment]) -> bool:
    """Whether one of the environments is a worker pool on another machine."""
    pools = (e.payload for e in environments if e.urn == common_urns.environments.EXTERNAL.urn)
    return any(not is_this_host(beam_runner_api_pb2.ExternalPayload.FromString(p).endpoint.url) for p in pools)


LISTENING_MODULES = (worker_handlers, worker_pool_main, abstract_job_service)
"""Modules of Beam that bind servers to every interface: the runner's, those of LOOPBACK workers, and of artifacts."""

for _module in LISTENING_MODULES:
    _module.grpc = _Grpc("grpc")
worker_handlers.GrpcServer = _RunnerServer


def workers_of_job(handler: GrpcWorkerHandler) -> list[Any]:
    """The handlers of all workers of the job that `handler` works on.

    A runner waits for every worker of a job, so all of them must end when one dies. Only the manager knows them.
    """
    return list(handler.control_handler._worker_manager._workers_by_id.values())


def pending_answers(handler: GrpcWorkerHandler) -> list[ControlFuture]:
    """The requests that the worker of `handler` has not answered.

    The runner waits for them without a time limit, so they must be answered when the worker dies.
    """
    return list(handler.control_conn._futures_by_id.values())


def connection_thread(handler: GrpcWorkerHandler) -> threading.Thread:
    """The thread that reads what the worker of `handler` sends.

    It starts when the worker connects and ends when the connection breaks: the only sign of life of a process on
    another machine.
    """
    return handler.control_conn._read_thread


def pool_address(handler: ExternalWorkerHandler) -> str:
    """The host:port of the worker pool of `handler`. Needed in messages, and to stop a worker."""
    return handler._external_payload.endpoint.url


class _RunnerOfManyWorkers(FnApiRunner):
    """The local runner with `workers` processes.

    The runner reads `--direct_num_workers` only in `run_pipeline`. A job service calls `run_via_runner_api`, where one
    worker is the default.
    """

    def __init__(self, workers: int, **others: Any) -> None:
        super().__init__(**others)
        self._num_workers = workers


class PortableJob(BeamJob, abc.ABC):
    """A job of the local job service, in which `invoke` takes the place of the call of Beam's runner.

    Beam's own job runs with one worker and cannot be watched.
    """

    @abc.abstractmethod
    def invoke(self) -> Any:
        """Run the job and return the result of the runner."""

    @property
    def id(self) -> str:
        """The job's id within its service."""
        return self._job_id

    @property
    def asked_workers(self) -> int:
        """The value of `--direct_num_workers`; 0 if it is not given."""
        return int(self.pipeline_options().view_as(DirectOptions).direct_num_workers)  # a client sends it as text

    @property
    def worker_metadata(self) -> MutableMapping[str, str]:
        """Metadata that the handlers of the job's workers can read."""
        return self._provision_info.provision_info.metadata

    def run_with(self, workers: int) -> Any:
        """Run the job with `workers` worker processes and return the result of the runner."""
        options: PipelineOptions = self.pipeline_options()
        runner = _RunnerOfManyWorkers(workers, provision_info=self._provision_info)
        return runner.run_via_runner_api(self._pipeline_proto, options)

    def _invoke_runner(self) -> Any:
        self.set_state(beam_job_api_pb2.JobState.RUNNING)
        return self.invoke()


def job_of_service(service: LocalJobServicer, job_id: str) -> Any:
    """The job of that id. The service has no public way to reach a job from within its process."""
    return service._jobs[job_id]


def without_time_limit(handle: JobServiceHandle) -> None:
    """Let `handle` follow a job of any length.

    Beam stops following a job after `--job_server_timeout` and reports it as failed.
    """
    handle.timeout = None


def dataflow_bytes(runner: DataflowRunner) -> tuple[int, int]:
    """Bytes of the request that creates the job, as JSON, and of the graph. Dataflow limits both.

    `job` and `proto_pipeline` are set by `run_pipeline`; `_pb` is the protobuf message under a proto-plus wrapper.
    """
    request = json_format.MessageToJson(runner.job.proto._pb)
    return len(request.encode()), runner.proto_pipeline.ByteSize()
