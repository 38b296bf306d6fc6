"""The local runner's worker processes, watched: where one dies, Beam waits for its answer for ever."""

from __future__ import annotations

import logging
import signal
import threading

import apache_beam as beam
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.portability.fn_api_runner.worker_handlers import SubprocessSdkWorkerHandler, WorkerHandler
from apache_beam.runners.portability.local_job_service import SubprocessSdkWorker

_TELL_SECONDS = 0.5


class WorkerDied(RuntimeError):
    """A worker process of the local runner that ended before its work did."""


def run_to_end(pipeline: beam.Pipeline, name: str) -> None:
    """Run `pipeline` and wait until it is through; `name` says in errors which it was.

    Raises WorkerDied within seconds where a local worker process dies, and whatever else the pipeline raises.
    """
    _deaths.clear()
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        if not _deaths:
            raise
        raise WorkerDied(
            f"{name}: a worker process {_deaths[0]}; the tables that were finished are kept. Where memory ran out, use "
            "fewer workers; then give the same command again: it goes on where it stopped"
        ) from error


_deaths: list[str] = []


@WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class _WatchedWorkerHandler(SubprocessSdkWorkerHandler):
    """Beam's own, but that all which the runner waits for fails when the process ends early."""

    def start_worker(self) -> None:
        self._closed = threading.Event()
        self.worker_thread = threading.Thread(name="run_worker", target=self._run)
        self.worker_thread.start()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _run(self) -> None:
        # What a worker prints are the tracebacks of errors, which the runner is told all the same.
        redirect = b"" if logging.getLogger("pipeline").isEnabledFor(logging.DEBUG) else b" 2>/dev/null"
        command = self._worker_command_line + redirect
        worker = SubprocessSdkWorker(command, self.control_address, self.provision_info, self.worker_id)
        try:
            worker.run()
            ending = "ended early with exit status 0"
        except RuntimeError as error:  # Beam's, whose last word is the return code
            ending = _ending(int(str(error).rpartition(" ")[2]))
        if self._closed.is_set():
            return
        _deaths.append(ending)
        while not self._closed.wait(_TELL_SECONDS):  # also what is asked for from now on
            for handler in list(self.control_handler._worker_manager._workers_by_id.values()):
                for future in list(handler.control_conn._futures_by_id.values()):
                    future.set(beam_fn_api_pb2.InstructionResponse(error=f"a worker process {ending}"))


def _ending(returncode: int) -> str:
    number = -returncode if returncode < 0 else returncode - 128  # of a shell: 128 + the signal
    if number in list(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended early with exit status {returncode}"
