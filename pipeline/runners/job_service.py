"""A job service for the portable runner: Beam's own local one, but for what it lacks.

Beam's runs each job with one worker, whatever is asked for; waits for ever where that worker dies; and goes on with a
job whose client is gone. Here a job has as many workers as `--direct_num_workers` says, they are watched
(`pipeline.runners.workers`), and the job ends with its client, as a local run does.

    python -m pipeline.runners.job_service --port 8099
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from apache_beam.options.pipeline_options import DirectOptions
from apache_beam.portability.api import beam_job_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.local_job_service import BeamJob, LocalJobServicer

from pipeline.runners import workers

_GOING = (beam_job_api_pb2.JobState.STARTING, beam_job_api_pb2.JobState.RUNNING)


class JobService(LocalJobServicer):
    """As Beam's LocalJobServicer; in this process where `start_grpc_server` is not called."""

    def __init__(self) -> None:
        self._staging = tempfile.TemporaryDirectory(prefix="pairsift_job_service_")  # goes with this object
        super().__init__(self._staging.name, _Job)

    def DescribePipelineOptions(
        self, request: Any, context: Any = None, timeout: Any = None
    ) -> beam_job_api_pb2.DescribePipelineOptionsResponse:
        # By this a client tells this service from Beam's own, which describes none.
        option = beam_job_api_pb2.PipelineOptionDescriptor(
            name="direct_num_workers",
            type=beam_job_api_pb2.PipelineOptionType.INTEGER,
            description="Worker processes of the job; 0: one for each core of the job service's machine.",
        )
        return beam_job_api_pb2.DescribePipelineOptionsResponse(options=[option])

    def GetStateStream(
        self, request: Any, context: Any = None, timeout: Any = None
    ) -> Iterator[beam_job_api_pb2.JobStateEvent]:
        if context is not None:  # a client in another process, which may die
            left = functools.partial(self._end_unless_over, request.job_id)
            context.add_callback(lambda: threading.Thread(target=left, daemon=True).start())
        yield from super().GetStateStream(request, context, timeout)

    def _end_unless_over(self, job_id: str) -> None:
        """For a job that nobody waits for any more. Its output folder may have another writer next."""
        job = self._jobs[job_id]
        while job.state in _GOING:
            workers.end_job(job_id, "was killed, because the run that its job belongs to is gone")
            time.sleep(0.5)  # its workers may not have been started yet


class _Job(BeamJob):
    def _invoke_runner(self) -> Any:
        self.set_state(beam_job_api_pb2.JobState.RUNNING)
        self._provision_info.provision_info.metadata[workers.JOB] = self._job_id
        options = self.pipeline_options()
        asked = int(options.view_as(DirectOptions).direct_num_workers)  # a text, where a client has sent it
        runner = _Runner(asked or os.cpu_count() or 1, provision_info=self._provision_info)
        try:
            return runner.run_via_runner_api(self._pipeline_proto, options)
        except Exception as error:
            death = workers.death_in(self._job_id)
            if death is None:
                raise
            raise workers.WorkerDied(death) from error  # what its death led to says less


class _Runner(FnApiRunner):
    """The local runner, which by itself heeds the number of workers only where it gets no ready-made proto."""

    def __init__(self, workers: int, **others: Any) -> None:
        super().__init__(**others)
        self._num_workers = workers


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="Runs jobs of `pairsift … -- --runner=PortableRunner`.")
    parser.add_argument("--port", type=int, default=0, help="where it listens; 0: anywhere (it says where)")
    port = parser.parse_args().port
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    service = JobService()
    try:
        print(f"listening on localhost:{service.start_grpc_server(port)}", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        service.stop()


if __name__ == "__main__":
    main()
