"""The specs of the flex templates: what Dataflow reads to know a template's image, parameters and defaults.

    python -m pipeline.dataflow.template.specs my-dataflow.yaml

writes them to the folder `templates` of the launch settings.
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
    """The content of a template's spec, a `ContainerSpec` of Dataflow's API."""
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
    """Write the spec of every template; their paths."""
    paths = []
    for template in TEMPLATES:
        paths.append(files.join(settings.templates.rstrip("/"), f"{template}.json"))
        files.write_json(paths[-1], spec(settings, template))
    return paths


def main(arguments: list[str]) -> None:
    """Entry point."""
    if len(arguments) != 1:
        sys.exit("use: python -m pipeline.dataflow.template.specs SETTINGS.yaml")
    try:
        settings = load_dataflow_settings(arguments[0])
    except SettingsError as error:
        sys.exit("\n".join(f"{error.source}: {fault}" for fault in error.faults))
    try:
        paths = write_specs(settings)
    except OSError as error:  # says which, why, and what to do
        sys.exit(str(error))
    for path in paths:
        print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
