"""Watched worker processes. If a worker process dies, Beam alone waits forever for its answer.

This module replaces two of Beam's worker handlers: the processes of the local runner (`multi_processing`) and those of
an external worker pool. Both serve the Beam runner of this process: the local runner, or a job service
(`pipeline.runners.job_service`).
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc, beam_runner_api_pb2
from apache_beam.runners.runner import PipelineResult
from google.protobuf import json_format, text_format

from pipeline.runners.beam_internals import (
    ExternalWorkerHandler,
    GrpcWorkerHandler,
    WorkerHandler,
    connection_thread,
    pending_answers,
    pool_address,
    workers_of_job,
)
from pipeline.runners.hosts import is_this_host

JOB = "pairsift_job"
"""Key of the job's id in the provision metadata of a worker, which a job service sets."""

_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # to start Python and import Beam
_ASK_SECONDS = 30.0
_ANSWER_SECONDS = 300.0  # a library may hold the GIL for minutes

_MARK = "a worker process "
_deaths: dict[str, str] = {}  # job ("" for the local runner) -> how its first worker to die ended
_handlers: weakref.WeakSet[_Watched] = weakref.WeakSet()
_handlers_lock = threading.Lock()


class WorkerDied(RuntimeError):
    """A worker process died before its work was done, or could not be started."""


class JobServiceGone(RuntimeError):
    """A job service stopped answering."""


def run_to_end(pipeline: beam.Pipeline, name: str) -> PipelineResult:
    """Run `pipeline` to its end and return its result. `name` identifies the pipeline in error messages.

    Raises WorkerDied within seconds if a worker process dies that this module or pairsift's job service watches,
    JobServiceGone, and any error of the pipeline.
    """
    _deaths.clear()
    try:
        result = pipeline.run()
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            result.cancel()  # the output folder may get another writer
            raise
        return result
    except Exception as error:
        death = next(iter(_deaths.values()), None) or _reported_by_job_service(error)
        if death is None and isinstance(error, grpc.RpcError):
            raise JobServiceGone(
                f"{name}: the job service is gone ({_details(error)}); start it again, then run the same command "
                "again to resume"
            ) from error
        if death is None:
            raise
        raise WorkerDied(
            f"{name}: {death}; finished tables are kept. If memory ran out, use fewer workers. Run the same command "
            "again to resume"
        ) from error


def death_in(job: str) -> str | None:
    """How a worker of that job of a job service died; None if none did."""
    return _deaths.get(job)


def end_job(job: str, why: str) -> None:
    """Kill the workers of that job of a job service, so that it fails. `why` ends the sentence "a worker process …"."""
    with _handlers_lock:
        handlers = list(_handlers)
    for handler in handlers:
        if handler.job == job:
            handler.fail(why)


def _details(error: grpc.RpcError) -> str:
    """The status and details of a failed call on one line; its text has many."""
    return f"{error.code().name}: {' '.join(str(error.details()).split())}"


def _reported_by_job_service(error: Exception) -> str | None:
    """How a worker died, if a job service in another process reported that as the cause of `error`."""
    last = str(error).strip().rpartition("\n")[2]
    found = last.find(_MARK)
    return last[found:] if found >= 0 else None


class _Watched(GrpcWorkerHandler, abc.ABC):
    """The handler of a worker process. If the process dies, every pending request of the runner fails, and the other
    workers of the job are killed."""

    def __init__(self, *others: Any) -> None:
        super().__init__(*others)
        self._closed = threading.Event()
        self._watcher = threading.Thread(name="watch_worker", target=self._watch, daemon=True)
        with _handlers_lock:
            _handlers.add(self)

    @property
    def job(self) -> str:
        """The job of a job service that the worker works on; empty for the local runner."""
        return self.provision_info.provision_info.metadata.get(JOB, "")

    def close(self) -> None:
        if sys.exc_info()[0] is not None and not any(handler._closed.is_set() for handler in workers_of_job(self)):
            # The job has failed. If a worker has just died, give its watcher time to see that.
            time.sleep(2 * _POLL_SECONDS)
        self._closed.set()
        super().close()

    @abc.abstractmethod
    def kill(self) -> None:
        """End the process now, if it was started."""

    def fail(self, why: str) -> None:
        """Kill all workers of the job and fail every pending request of the runner. `why` says how this one died."""
        death = f"{_MARK}{why}"
        _deaths.setdefault(self.job, death)
        failure = beam_fn_api_pb2.InstructionResponse(error=death)
        while not self._closed.wait(_POLL_SECONDS):  # repeat: workers may still start, or get requests
            for handler in workers_of_job(self):
                handler.kill()
                for future in pending_answers(handler):
                    future.set(failure)

    @abc.abstractmethod
    def _watch(self) -> None:
        """Call `fail` if the worker ends before `close`."""


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _LocalWorker(_Watched):
    """A process of the local runner. Replaces Beam's SubprocessSdkWorkerHandler. A process that does not end in time is
    killed."""

    def __init__(self, command: bytes, *others: Any) -> None:
        super().__init__(*others)
        self._command = shlex.split(command.decode())
        self._process: subprocess.Popen | None = None

    def start_worker(self) -> None:
        options = self.provision_info.provision_info.pipeline_options
        environment = {
            "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(self.control_api_service_descriptor()),
            "LOGGING_API_SERVICE_DESCRIPTOR": text_format.MessageToString(self.logging_api_service_descriptor()),
            "PIPELINE_OPTIONS": json_format.MessageToJson(options),
            "WORKER_ID": self.worker_id,
        }
        # It prints tracebacks of errors that the runner reports as well.
        verbose = logging.getLogger("pipeline").isEnabledFor(logging.DEBUG)
        self._process = subprocess.Popen(
            self._command, env={**os.environ, **environment}, stderr=None if verbose else subprocess.DEVNULL
        )
        self._watcher.start()

    def kill(self) -> None:
        if self._process:
            self._process.kill()

    def stop_worker(self) -> None:
        self._watcher.join(_STOP_SECONDS)
        # A worker that had not connected when the run failed is never told to stop.
        self.kill()
        self._watcher.join()

    def _watch(self) -> None:
        assert self._process
        returncode = self._process.wait()
        if not self._closed.is_set():
            self.fail(_ending(returncode))


@WorkerHandler.register_environment(common_urns.environments.EXTERNAL.urn, beam_runner_api_pb2.ExternalPayload)
class _ExternalWorker(_Watched, ExternalWorkerHandler):
    """A process of a worker pool. All that is known is whether its connection is up and whether it answers."""

    def __init__(self, payload: beam_runner_api_pb2.ExternalPayload, *others: Any) -> None:
        self._is_here = is_this_host(payload.endpoint.url)
        super().__init__(payload, *others)

    def host_from_worker(self) -> str:
        # The name of this machine stands for an address that the runner does not listen on.
        return "localhost" if self._is_here else super().host_from_worker()

    def start_worker(self) -> None:
        try:
            super().start_worker()
        except grpc.RpcError as error:
            raise WorkerDied(
                f"the worker pool at {self._pool} starts no worker ({_details(error)}); restart the pool, then run the "
                "same command again to resume"
            ) from error
        self._watcher.start()

    def kill(self) -> None:
        # The call fails if the pool itself is gone.
        with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(self._pool) as channel:
            request = beam_fn_api_pb2.StopWorkerRequest(worker_id=self.worker_id)
            beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel).StopWorker(request, timeout=_STOP_SECONDS + 5)

    def stop_worker(self) -> None:
        # The worker has closed its connection and ends; the pool alone would keep it as a zombie.
        self.kill()

    @property
    def _pool(self) -> str:
        return pool_address(self)

    def _watch(self) -> None:
        connection, started = connection_thread(self), time.monotonic()
        while connection.ident is None:
            if time.monotonic() - started > _CONNECT_SECONDS:
                self.fail(
                    f"of the pool at {self._pool} has not connected within {_CONNECT_SECONDS:.0f} s: is pairsift "
                    "installed for the first `python` on that pool's PATH?"
                )
            if self._closed.wait(_POLL_SECONDS):
                return
        asked, answer = time.monotonic(), None
        while not self._closed.wait(_POLL_SECONDS):
            seconds = time.monotonic() - asked
            if not connection.is_alive():
                self.fail(f"of the pool at {self._pool} is gone: its connection broke")
            elif answer and not answer.is_done() and seconds > _ANSWER_SECONDS:
                self.fail(f"of the pool at {self._pool} has not answered for {seconds:.0f} s")
            elif seconds > _ASK_SECONDS and (answer is None or answer.is_done()):
                question = beam_fn_api_pb2.HarnessMonitoringInfosRequest()
                request = beam_fn_api_pb2.InstructionRequest(harness_monitoring_infos=question)
                asked, answer = time.monotonic(), self.control_conn.push(request)


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by signal {-returncode} ({signal.strsignal(-returncode)})"
    return f"ended early with exit status {returncode}"
