"""The parameters of the flex templates, as Beam pipeline options. templates/*.json describe each of them."""

from __future__ import annotations

import argparse

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.dataflow.settings import ALL_WORKERS
from pipeline.output_folder import versions


class PairsiftOptions(PipelineOptions):
    """The parameters of a template. All values arrive as text."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipe", help="The recipe's path.")
        parser.add_argument("--input", help="Folder of webdataset tars, or a pattern ending in .tar.")
        parser.add_argument("--output", help="Folder for all outputs.")
        parser.add_argument(
            "--keep_versions",
            default=str(versions.KEPT),
            help="Number of runs whose results are kept, including this one.",
        )
        parser.add_argument(
            "--accelerator",
            default="",
            help="The GPU of stage 2's workers: type:TYPE;count:1;machine_type:MACHINE_TYPE;install-nvidia-driver.",
        )
        parser.add_argument(
            "--gpus",
            default=ALL_WORKERS,
            help="The workers that have the GPU: all_workers, or, with right_fitting, only those that run models.",
        )
        # Not a parameter for users: the template's spec sets it (`pipeline.dataflow.template.specs`).
        parser.add_argument("--stage", help=argparse.SUPPRESS)
