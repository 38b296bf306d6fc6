"""Writes the specs of the flex templates, from which Dataflow reads their image, parameters and defaults.

    python -m pipeline.dataflow.template.specs my-dataflow.yaml

writes the specs to the folder that the setting `templates` names.
"""

from __future__ import annotations

import importlib.resources
import json
import sys
from typing import Any

from pipeline.dataflow.settings import TEMPLATES, DataflowSettings, load_dataflow_settings
from transforms.core.settings import SettingsError
from transforms.storage import files


def spec(settings: DataflowSettings, template: str) -> dict[str, Any]:
    """Return the spec of a template, a `ContainerSpec` of Dataflow's API."""
    metadata = (importlib.resources.files("templates") / f"{template}.json").read_text(encoding="utf-8")
    return {
        "image": settings.image,
        "sdkInfo": {"language": "PYTHON"},
        "metadata": json.loads(metadata),
        "defaultEnvironment": {
            "sdkContainerImage": settings.image,
            "additionalPipelineOptions": [f"stage={template}"],
        },
    }


def write_specs(settings: DataflowSettings) -> list[str]:
    """Write the specs of all templates and return their paths."""
    paths = []
    for template in TEMPLATES:
        paths.append(files.join(settings.templates.rstrip("/"), f"{template}.json"))
        files.write_json(paths[-1], spec(settings, template))
    return paths


def main(arguments: list[str]) -> None:
    """Write the specs for the launch settings that the one argument names."""
    if len(arguments) != 1:
        sys.exit("usage: python -m pipeline.dataflow.template.specs SETTINGS.yaml")
    try:
        settings = load_dataflow_settings(arguments[0])
    except SettingsError as error:
        sys.exit("\n".join(f"{error.source}: {fault}" for fault in error.faults))
    try:
        paths = write_specs(settings)
    except OSError as error:  # the message names the path, the cause and the remedy
        sys.exit(str(error))
    for path in paths:
        print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
