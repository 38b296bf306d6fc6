"""A job service for the portable runner, based on Beam's local job service.

Beam's service runs each job with one worker, waits forever if that worker dies, and continues a job whose client is
gone. This service starts as many workers as `--direct_num_workers` says, watches them (`pipeline.runners.workers`), and
ends a job when its client ends.

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

from apache_beam.portability.api import beam_job_api_pb2

from pipeline.runners import workers
from pipeline.runners.beam_internals import LocalJobServicer, PortableJob, job_of_service

_ACTIVE = (beam_job_api_pb2.JobState.STARTING, beam_job_api_pb2.JobState.RUNNING)


class JobService(LocalJobServicer):
    """Beam's LocalJobServicer with watched workers. Serves this process only until `start_grpc_server` is called."""

    def __init__(self) -> None:
        self._staging = tempfile.TemporaryDirectory(prefix="pairsift_job_service_")  # deleted with this object
        super().__init__(self._staging.name, _PortableJob)

    def DescribePipelineOptions(
        self, request: Any, context: Any = None, timeout: Any = None
    ) -> beam_job_api_pb2.DescribePipelineOptionsResponse:
        # Clients recognise this service by this answer: Beam's own describes no options.
        option = beam_job_api_pb2.PipelineOptionDescriptor(
            name="direct_num_workers",
            type=beam_job_api_pb2.PipelineOptionType.INTEGER,
            description="Worker processes of the job; 0: one for each core of this machine.",
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
        """End a job whose client is gone, because its output folder may get another writer."""
        job = job_of_service(self, job_id)
        while job.state in _ACTIVE:
            workers.end_job(job_id, "was killed, because the client of its job is gone")
            time.sleep(0.5)  # its workers may not have been started yet


class _PortableJob(PortableJob):
    def invoke(self) -> Any:
        self.worker_metadata[workers.JOB] = self.id
        try:
            return self.run_with(self.asked_workers or os.cpu_count() or 1)
        except Exception as error:
            death = workers.death_in(self.id)
            if death is None:
                raise
            raise workers.WorkerDied(death) from error  # more precise than the errors that the death led to


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.runners.job_service",
        description="Run jobs of `pairsift … -- --runner=PortableRunner`.",
    )
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0: any free port, which is printed")
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
