"""Worker processes, watched: where one dies, Beam waits for its answer for ever.

This module takes the place of two of Beam's worker handlers, the local runner's processes (`multi_processing`) and
those of an external worker pool. Both serve whichever of Beam's runners is in this process: the local runner itself, or
a job service (`pipeline.runners.job_service`).
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
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    ExternalWorkerHandler,
    GrpcWorkerHandler,
    WorkerHandler,
)
from apache_beam.runners.runner import PipelineResult
from google.protobuf import json_format, text_format

JOB = "pairsift_job"
"""Where a job service tells its workers' handlers, in the metadata of their provision, whose they are."""

_TELL_SECONDS = 0.5
_STOP_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # to start Python and import Beam
_ASK_SECONDS = 30.0
_ANSWER_SECONDS = 300.0  # a library may keep the GIL for a while

_MARK = "a worker process "
_deaths: dict[str, str] = {}  # by job ("": the local runner's own): how the first worker ended that ended early
_handlers: weakref.WeakSet[_Watched] = weakref.WeakSet()
_handlers_lock = threading.Lock()


class WorkerDied(RuntimeError):
    """A worker process that ended before its work did, or that cannot be had."""


class JobServiceGone(RuntimeError):
    """A job service that does not answer any more."""


def run_to_end(pipeline: beam.Pipeline, name: str) -> PipelineResult:
    """Run `pipeline`, wait until it is through and give its result; `name` says in errors which it was.

    Raises WorkerDied within seconds where a worker process dies that is watched here or by our job service,
    JobServiceGone, and whatever else the pipeline raises.
    """
    _deaths.clear()
    try:
        result = pipeline.run()
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            result.cancel()  # the output folder will have another writer next
            raise
        return result
    except Exception as error:
        death = next(iter(_deaths.values()), None) or _told_by_job_service(error)
        if death is None and isinstance(error, grpc.RpcError):
            raise JobServiceGone(
                f"{name}: the job service is gone ({_details(error)}); start it again, then give the same command "
                "again: it goes on where it stopped"
            ) from error
        if death is None:
            raise
        raise WorkerDied(
            f"{name}: {death}; the tables that were finished are kept. Where memory ran out, use "
            "fewer workers; then give the same command again: it goes on where it stopped"
        ) from error


def death_in(job: str) -> str | None:
    """How a worker ended early in the job that a job service knows by that name, if one did."""
    return _deaths.get(job)


def end_job(job: str, why: str) -> None:
    """Kill the workers of the job that a job service knows by that name, and let it fail."""
    with _handlers_lock:
        handlers = list(_handlers)
    for handler in handlers:
        if handler.job == job:
            handler.fail(why)


def _details(error: grpc.RpcError) -> str:
    """What a call came to, on one line; its text takes many."""
    return f"{error.code().name}: {' '.join(str(error.details()).split())}"


def _told_by_job_service(error: Exception) -> str | None:
    """How a worker ended, where a job service in another process has told so as the cause of `error`."""
    last = str(error).strip().rpartition("\n")[2]
    found = last.find(_MARK)
    return last[found:] if found >= 0 else None


class _Watched(GrpcWorkerHandler, abc.ABC):
    """The handler of a worker process. Where that ends early, all that the runner waits for fails, and the other
    workers are killed."""

    def __init__(self, *others: Any) -> None:
        super().__init__(*others)
        self._closed = threading.Event()
        self._watcher = threading.Thread(name="watch_worker", target=self._watch, daemon=True)
        with _handlers_lock:
            _handlers.add(self)

    @property
    def job(self) -> str:
        """Which job of a job service's it works on; empty where there is none."""
        return self.provision_info.provision_info.metadata.get(JOB, "")

    @property
    def _all_of_job(self) -> list[_Watched]:
        return list(self.control_handler._worker_manager._workers_by_id.values())

    def close(self) -> None:
        if sys.exc_info()[0] is not None and not any(handler._closed.is_set() for handler in self._all_of_job):
            # The job has failed. Where that is because a worker has just died, its watcher sees it by now.
            time.sleep(2 * _TELL_SECONDS)
        self._closed.set()
        super().close()

    @abc.abstractmethod
    def kill(self) -> None:
        """End the process now, if it was started."""

    def fail(self, why: str) -> None:
        """Kill this worker and all others of its job, and let all that the runner asked of them fail."""
        death = f"{_MARK}{why}"
        _deaths.setdefault(self.job, death)
        failure = beam_fn_api_pb2.InstructionResponse(error=death)
        while not self._closed.wait(_TELL_SECONDS):  # again and again: workers may still be started, or asked for more
            for handler in self._all_of_job:
                handler.kill()
                for future in list(handler.control_conn._futures_by_id.values()):
                    future.set(failure)

    @abc.abstractmethod
    def _watch(self) -> None:
        """`fail` where the worker ends before `close`."""


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _LocalWorker(_Watched):
    """A process of the local runner, in place of Beam's SubprocessSdkWorkerHandler. Where it does not end when it
    should, it is killed."""

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
        # What it prints are the tracebacks of errors, which the runner is told all the same.
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
        # One that had not connected yet when the run failed never hears of its end.
        self.kill()
        self._watcher.join()

    def _watch(self) -> None:
        assert self._process
        returncode = self._process.wait()
        if not self._closed.is_set():
            self.fail(_ending(returncode))


@WorkerHandler.register_environment(common_urns.environments.EXTERNAL.urn, beam_runner_api_pb2.ExternalPayload)
class _ExternalWorker(_Watched, ExternalWorkerHandler):
    """A process of a worker pool, of which nothing is known but whether its connection holds and it answers."""

    def start_worker(self) -> None:
        try:
            super().start_worker()
        except grpc.RpcError as error:
            raise WorkerDied(
                f"the worker pool at {self._pool} starts no worker ({_details(error)}); start it again, then give the "
                "same command again: it goes on where it stopped"
            ) from error
        self._watcher.start()

    def kill(self) -> None:
        # A pool that is gone itself kills nobody.
        with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(self._pool) as channel:
            request = beam_fn_api_pb2.StopWorkerRequest(worker_id=self.worker_id)
            beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel).StopWorker(request, timeout=_STOP_SECONDS + 5)

    def stop_worker(self) -> None:
        # It has let go of its connection and will end; the pool, by itself, would keep it as a zombie.
        self.kill()

    @property
    def _pool(self) -> str:
        return self._external_payload.endpoint.url

    def _watch(self) -> None:
        connection, started = self.control_conn._read_thread, time.monotonic()
        while connection.ident is None:
            if time.monotonic() - started > _CONNECT_SECONDS:
                self.fail(
                    f"that the pool at {self._pool} started has not connected within {_CONNECT_SECONDS:.0f} s: is "
                    "pairsift installed for the `python` that comes first on that pool's PATH?"
                )
            if self._closed.wait(_TELL_SECONDS):
                return
        asked, answer = time.monotonic(), None
        while not self._closed.wait(_TELL_SECONDS):
            seconds = time.monotonic() - asked
            if not connection.is_alive():
                self.fail(f"of the pool at {self._pool} is gone: its connection broke off")
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
