"""Input figures of a plan, each with its unit and source. figures.yaml has those that come with the package."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from pipeline.estimate.units import Unit
from transforms.core.settings import Settings, SettingsError, load_settings

Kind = Literal["measured", "counted", "published", "price", "assumed", "given"]
"""measured: by us or by the user, with a command; counted: from an architecture or a data layout; published: by others;
price: a list price; assumed: by us, with the reason; given: by the user, the recipe or the launch settings."""

GROUPS = ("bytes", "cpu", "dimensions", "flops", "memory", "peak", "price", "rate", "share", "shuffle")
"""Names of figures start with one of these and a slash."""
UNGROUPED = ("utilisation", "shuffle_passes")

BENCHMARK_COMMAND = "python -m benchmarks.models --device cuda --json --no-peers"
BENCHMARK_MODELS = {
    "clip": ("ViT-L-14", "stage 2"),
    # Stage 2 of the other models would include reading and decoding, which their pairs are past.
    "itm": ("Salesforce/blip-itm-base-coco", "RunInference"),
    "digit": ("Salesforce/blip2-opt-2.7b", "RunInference"),
}
"""The models that BENCHMARK_COMMAND measures, and which of its rates the plan takes."""


class Known(Settings):
    """An input figure. `source` is the command that measured or counted it, the page that states it, or the reason for
    an assumption; `date` is the day of the measurement, or the day the page was read."""

    value: float = Field(ge=0.0)
    unit: str = Field(min_length=1)
    kind: Kind
    source: str = Field(min_length=1)
    date: str | None = Field(None, pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")
    region: str | None = None


class Figures(Settings):
    """Figures by name."""

    figures: dict[str, Known]


def load_figures(path: str | None = None) -> dict[str, Known]:
    """The package's figures, with those in the file at `path` added or replacing them. Raises SettingsError."""
    figures = dict(load_settings(str(importlib.resources.files("pipeline.estimate") / "figures.yaml"), Figures).figures)
    if path:
        given = load_settings(path, Figures).figures
        faults = [fault for name, known in given.items() if (fault := _fault(name, known, figures.get(name)))]
        if faults:
            raise SettingsError(path, faults)
        figures |= given
    return figures


def _fault(name: str, given: Known, replaced: Known | None) -> str | None:
    if name.partition("/")[0] not in GROUPS and name not in UNGROUPED:
        starts = ", ".join(f"{group}/" for group in GROUPS)
        return f"figures.{name}: unknown; allowed: names that start with {starts}, or {' or '.join(UNGROUPED)}"
    if replaced and Unit.parse(given.unit) != Unit.parse(replaced.unit):
        return f"figures.{name}.unit: got {given.unit}; allowed: {replaced.unit}"
    return None


def measured_rates(path: str, gpu: str) -> dict[str, Known]:
    """Pairs per second of `gpu` (Dataflow's name) from the output of BENCHMARK_COMMAND at `path`. Raises SettingsError,
    also where the measurement is of another GPU."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.loads([line for line in file.read().splitlines() if line.strip()][-1])
    except (OSError, ValueError, IndexError) as error:
        fault = f"its last line cannot be read as the JSON of `{BENCHMARK_COMMAND}`: {error}"
        raise SettingsError(path, [fault]) from error
    if not isinstance(content, dict) or "gpu" not in content:
        raise SettingsError(path, [f"has no gpu; it is not the output of `{BENCHMARK_COMMAND}`"])
    if not _is_gpu(str(content["gpu"]), gpu):
        raise SettingsError(path, [f"was measured on {content['gpu']}, but the launch settings say {gpu}"])
    return {f"rate/{name}/{gpu}": known for name, known in _rates(content, path).items()}


def _rates(content: Mapping[str, Any], path: str) -> dict[str, Known]:
    found = {}
    for subject, (model, what) in BENCHMARK_MODELS.items():
        for precision in ("bf16", "fp16", "fp32"):
            rate = content.get(f"{subject} {precision} {what}, pairs/s")
            if isinstance(rate, int | float) and rate > 0:
                found[f"{model}/{precision}"] = Known(
                    value=float(rate), unit="pairs/s per GPU", kind="measured",
                    source=f"`{BENCHMARK_COMMAND}` on {content['gpu']}: {path}",
                )  # fmt: skip
    if not found:
        raise SettingsError(path, [f"has no rates; it is not the output of `{BENCHMARK_COMMAND}`"])
    return found


def _is_gpu(name: str, gpu: str) -> bool:
    """Whether torch's name of a GPU (NVIDIA L4, Tesla T4, NVIDIA A100-SXM4-40GB) is Dataflow's `gpu`."""
    words = name.lower().replace("-", " ").split()
    wanted = gpu.removeprefix("nvidia-").removeprefix("tesla-").split("-")
    if wanted == ["a100"]:
        wanted.append("40gb")
    return all(word in words for word in wanted)
