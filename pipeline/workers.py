"""The local runner's worker processes, watched: where one dies, Beam waits for its answer for ever."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import threading

import apache_beam as beam
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.portability.fn_api_runner.worker_handlers import GrpcWorkerHandler, WorkerHandler
from apache_beam.runners.runner import PipelineResult
from google.protobuf import json_format, text_format

_TELL_SECONDS = 0.5
_STOP_SECONDS = 10.0

_deaths: list[str] = []  # of the pipeline that runs: how each of its workers ended that ended early


class WorkerDied(RuntimeError):
    """A worker process of the local runner that ended before its work did."""


def run_to_end(pipeline: beam.Pipeline, name: str) -> PipelineResult:
    """Run `pipeline`, wait until it is through and give its result; `name` says in errors which it was.

    Raises WorkerDied within seconds where a local worker process dies, and whatever else the pipeline raises.
    """
    _deaths.clear()
    try:
        result = pipeline.run()
        result.wait_until_finish()
        return result
    except Exception as error:
        if not _deaths:
            raise
        raise WorkerDied(
            f"{name}: a worker process {_deaths[0]}; the tables that were finished are kept. Where memory ran out, use "
            "fewer workers; then give the same command again: it goes on where it stopped"
        ) from error


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _WatchedWorkerHandler(GrpcWorkerHandler):
    """A worker process, in place of Beam's SubprocessSdkWorkerHandler. Where it ends early, all that the runner waits
    for fails, and the other workers are killed; where it does not end when it should, it is killed."""

    def __init__(self, command: bytes, *others: object) -> None:
        super().__init__(*others)
        self._command, self._closed = shlex.split(command.decode()), threading.Event()
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
        self._watcher = threading.Thread(name="watch_worker", target=self._watch, args=[self._process])
        self._watcher.start()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def kill(self) -> None:
        """End the process now, if it was started."""
        if self._process:
            self._process.kill()

    def stop_worker(self) -> None:
        self._watcher.join(_STOP_SECONDS)
        # One that had not connected yet when the run failed never hears of its end.
        self.kill()
        self._watcher.join()

    def _watch(self, process: subprocess.Popen) -> None:
        returncode = process.wait()
        if self._closed.is_set():
            return
        _deaths.append(_ending(returncode))
        failure = beam_fn_api_pb2.InstructionResponse(error=f"a worker process {_deaths[0]}")
        while not self._closed.wait(_TELL_SECONDS):  # again and again: workers may still be started, or asked for more
            for handler in list(self.control_handler._worker_manager._workers_by_id.values()):
                handler.kill()
                for future in list(handler.control_conn._futures_by_id.values()):
                    future.set(failure)


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by signal {-returncode} ({signal.strsignal(-returncode)})"
    return f"ended early with exit status {returncode}"
