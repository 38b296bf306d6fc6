"""Figures that a plan is made from: each with its unit and where it comes from. figures.yaml holds those that come
with the package."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from transforms.core.settings import Settings, SettingsError, load_settings

Kind = Literal["measured", "counted", "published", "price", "assumed", "given"]
"""measured: by us or by the user, with a command; counted: from an architecture; published: by others, named; price: a
list price; assumed: by us, and said so; given: by the user, the recipe or the launch settings."""

GROUPS = ("bytes", "cpu", "dimensions", "flops", "memory", "peak", "price", "rate", "share", "shuffle")
"""A figure's name is one of these, or starts with one and a slash."""
ALONE = ("utilisation", "shuffle_passes")

BENCHMARK_MODELS = {
    "clip": ("ViT-L-14", "stage 2"),
    # The others' stage 2 holds reading and decoding too, which the pairs have behind them when these are asked.
    "itm": ("Salesforce/blip-itm-base-coco", "RunInference"),
    "digit": ("Salesforce/blip2-opt-2.7b", "RunInference"),
}
"""What `python -m benchmarks.models --device cuda` measures, and which of its rates count."""


class Known(Settings):
    """One figure. `source` is the command that measured or counted it, the page that says it, or the reason why it is
    assumed; `date` when that was done, or when the page was read."""

    value: float = Field(ge=0.0)
    unit: str = Field(min_length=1)
    kind: Kind
    source: str = Field(min_length=1)
    date: str | None = Field(None, pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")
    region: str | None = None


class Figures(Settings):
    """Figures by their name."""

    figures: dict[str, Known]


def load_figures(path: str | None = None) -> dict[str, Known]:
    """The package's figures, those in the file at `path` put in their place or added. Raises SettingsError."""
    own = str(importlib.resources.files("pipeline.estimate") / "figures.yaml")
    figures = dict(load_settings(own, Figures).figures)
    if path:
        given = load_settings(path, Figures).figures
        unknown = [
            f"figures.{name}: unknown; allowed: a name that starts with {', '.join(f'{group}/' for group in GROUPS)}, "
            f"or {' or '.join(ALONE)}"
            for name in given
            if name.partition("/")[0] not in GROUPS and name not in ALONE
        ]
        if unknown:
            raise SettingsError(path, unknown)
        figures |= given
    return figures


def measured_rates(path: str, gpu: str) -> dict[str, Known]:
    """The pairs a second in the output of `python -m benchmarks.models --device cuda --json --no-peers` at `path`, as
    those of `gpu`, the Dataflow name of the launch settings. Raises SettingsError, also where it was another GPU."""
    command = "python -m benchmarks.models --device cuda --json --no-peers"
    try:
        with open(path, encoding="utf-8") as file:
            content = json.loads([line for line in file.read().splitlines() if line.strip()][-1])
    except (OSError, ValueError, IndexError) as error:
        raise SettingsError(path, [f"its last line cannot be read as the JSON of `{command}`: {error}"]) from error
    if not isinstance(content, dict) or "gpu" not in content:
        raise SettingsError(path, [f"names no gpu; it is not the output of `{command}`"])
    if not _is_gpu(str(content["gpu"]), gpu):
        raise SettingsError(path, [f"was measured on {content['gpu']}, but the launch settings say {gpu}"])
    return {f"rate/{name}/{gpu}": known for name, known in _rates(content, path, command).items()}


def _rates(content: Mapping[str, Any], path: str, command: str) -> dict[str, Known]:
    found = {}
    for subject, (model, what) in BENCHMARK_MODELS.items():
        for precision in ("bf16", "fp16", "fp32"):
            rate = content.get(f"{subject} {precision} {what}, pairs/s")
            if isinstance(rate, int | float) and rate > 0:
                found[f"{model}/{precision}"] = Known(
                    value=float(rate), unit="pairs/s a GPU", kind="measured",
                    source=f"`{command}` on {content['gpu']}: {path}",
                )  # fmt: skip
    if not found:
        raise SettingsError(path, [f"holds no rate; it is not the output of `{command}`"])
    return found


def _is_gpu(name: str, gpu: str) -> bool:
    """Whether torch's name of a GPU (NVIDIA L4, Tesla T4, NVIDIA A100-SXM4-40GB) means Dataflow's."""
    words = name.lower().replace("-", " ").split()
    wanted = gpu.removeprefix("nvidia-").removeprefix("tesla-").split("-")
    if wanted == ["a100"]:
        wanted.append("40gb")
    return all(word in words for word in wanted)
