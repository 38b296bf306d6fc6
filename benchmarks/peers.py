"""Runs clip-retrieval and data-juicer on the same images, each in its environment from `make bench-peers`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from benchmarks.pictures import write_files, write_tars
from transforms.core.records import Sample

ENVIRONMENTS = Path(__file__).parent.parent / ".bench"
CLIP_RETRIEVAL = ENVIRONMENTS / "clip-retrieval" / "bin" / "clip-retrieval"
DATA_JUICER = ENVIRONMENTS / "data-juicer" / "bin" / "dj-process"

# Data-juicer installs missing packages while it runs. Downloads must not be part of a measurement.
_OFFLINE = {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


def clip_retrieval_seconds(samples: list[Sample], weights: Path, architecture: str, folder: Path) -> float:
    """Wall seconds of `clip-retrieval inference` with its default settings, which need a tar for each of 4 workers."""
    write_tars(folder / "pool", samples, 4)
    return _seconds(
        str(CLIP_RETRIEVAL), "inference",
        f"--input_dataset={folder}/pool/{{00000..00003}}.tar", "--input_format=webdataset",
        f"--output_folder={folder}/out", f"--clip_model=open_clip:{architecture}/{weights}",
        log=folder / "log",
    )  # fmt: skip


def data_juicer_seconds(samples: list[Sample], operator: str, model: dict[str, str], folder: Path) -> float:
    """Wall seconds of `dj-process` with two processes and one filter that keeps everything."""
    paths = write_files(folder / "pictures", samples)
    lines = [
        {"text": f"<__dj__image> {sample.annotation.caption} <|__dj__eoc|>", "images": [str(path)]}
        for sample, path in zip(samples, paths, strict=True)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "project_name": "benchmark", "dataset_path": f"{folder}/pool.jsonl", "export_path": f"{folder}/out.jsonl",
        "np": 2, "use_cache": False, "skip_op_error": False, "open_tracer": False,
        "process": [{operator: {**model, "min_score": -1.0}}],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))  # JSON is YAML
    (folder / "config.json").rename(folder / "config.yaml")
    seconds = _seconds(str(DATA_JUICER), "--config", str(folder / "config.yaml"), log=folder / "log")
    kept = len((folder / "out.jsonl").read_text().splitlines())
    if kept != len(samples):
        raise RuntimeError(f"data-juicer kept {kept} of {len(samples)}; see {folder / 'log'}")
    return seconds


def _seconds(*command: str, log: Path) -> float:
    environment = {**os.environ, **_OFFLINE, "PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}"}
    started = time.monotonic()
    with log.open("wb") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, check=False,
            timeout=1800,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed; see {log}:\n{log.read_text(errors='replace')[-1500:]}")
    return time.monotonic() - started
