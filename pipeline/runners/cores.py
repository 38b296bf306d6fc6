"""How the worker processes of a machine share its cores, so that they do not compete for them.

By default Torch starts a thread for every core in every process. Two workers on two cores then took 3.2 times as long
for stage 2 as one.
"""

from __future__ import annotations

import os

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

from pipeline.runners import supported


def cores_per_worker(beam_options: list[str]) -> int:
    """The cores of this machine divided by its worker processes, at least 1; 1 where the workers are elsewhere.

    Dataflow, Flink and Spark start a worker for each core.
    """
    if not supported.is_here(beam_options):
        return 1
    return max(1, len(os.sched_getaffinity(0)) // _processes(beam_options))


def _processes(beam_options: list[str]) -> int:
    options = PipelineOptions(beam_options).view_as(DirectOptions)
    if supported.kind_of(beam_options) is supported.Kind.LOCAL and options.direct_running_mode == "in_memory":
        return 1
    return options.direct_num_workers or len(os.sched_getaffinity(0))  # Beam takes 0 for the number of cores
