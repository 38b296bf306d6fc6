"""Names that say what a thing is for: the same output and stage give the same name, and Dataflow refuses a second
running job of one name, so that nothing runs twice over one output folder."""

from __future__ import annotations

import hashlib


def run_name(output: str) -> str:
    """The name of everything that works on the folder `output`: its workflow, its schedule."""
    return f"pairsift-{hashlib.sha256(output.rstrip('/').encode()).hexdigest()[:12]}"


def job_name(output: str, template: str) -> str:
    """The name of the Dataflow job that runs `template` on the folder `output`."""
    return f"{run_name(output)}-{template.replace('_', '-')}"
