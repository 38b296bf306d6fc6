"""Names of jobs, workflows and schedules, derived from the output folder and the stage.

The same output and stage give the same name. Dataflow refuses a second running job with the same name, so two jobs
never run the same stage on one output folder.
"""

from __future__ import annotations

import hashlib


def run_name(output: str) -> str:
    """Return the name of the workflow and the schedule of the folder `output`."""
    return f"pairsift-{hashlib.sha256(output.rstrip('/').encode()).hexdigest()[:12]}"


def job_name(output: str, template: str) -> str:
    """Return the name of the Dataflow job that runs `template` on the folder `output`."""
    return f"{run_name(output)}-{template.replace('_', '-')}"
