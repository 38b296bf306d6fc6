"""Tests of the Dockerfile without a container engine; `make image-check` runs its steps."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def copied() -> list[str]:
    """Return the paths that are copied from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1] if source != "."]


def is_sent(path: str) -> bool:
    """Return whether .dockerignore admits a path, according to its last matching line."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *(str(parent) for parent in Path(path).parents)]
        names = [part.rpartition("/")[2] for part in parts] if "**/" in line else parts
        if line and not line.startswith("#") and any(fnmatch.fnmatchcase(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_versions_of_boot_binary_beam_and_python_agree() -> None:
    (beam,) = re.findall(r"^ARG BEAM_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert beam == PINNED["apache-beam"]
    pythons = re.findall(r"^FROM \S*python(?::)?(\d)\.?(\d\d)", DOCKERFILE, re.MULTILINE)
    assert pythons == [("3", "11")] * 3  # of the workers, the launcher and the image


def test_copied_paths_exist_and_are_sent_to_the_engine() -> None:
    assert len(copied()) == 4
    for source in copied():
        assert (ROOT / source).is_file()
        assert is_sent(source), source


@pytest.mark.parametrize("path", ["setup.py", "pipeline/demo/pool/00000.tar", "templates/cross_modality.json"])
def test_complete_package_is_sent(path: str) -> None:
    assert (ROOT / path).is_file()
    assert is_sent(path)


@pytest.mark.parametrize("path", [".git/config", "tests/helpers.py", "out/subset.npy", "pipeline/__pycache__/x.pyc"])
def test_nothing_else_is_sent(path: str) -> None:
    assert not is_sent(path)


def test_base_images_are_pinned() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    for base in bases:
        assert base in stages or (":" in base and not base.endswith(":latest")), base


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["install_package.sh", "{}/venv", "tpu"], "PROCESSOR: got tpu; allowed: gpu, cpu, cu126"),
        (["fetch_models.sh", "{}/models", "org/name"], "MODELS: got org/name; allowed: ORG/NAME@COMMIT"),
    ],
)
def test_invalid_build_argument_stops_the_build(tmp_path: Path, command: list[str], message: str) -> None:
    program, *arguments = (part.format(tmp_path) for part in command)
    done = subprocess.run([ROOT / "tools" / program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == message
    assert not (tmp_path / "venv").exists()


def test_build_without_models_needs_no_network(tmp_path: Path) -> None:
    subprocess.run([ROOT / "tools" / "fetch_models.sh", tmp_path / "models"], check=True, env={"PATH": "/usr/bin:/bin"})
    assert list((tmp_path / "models").iterdir()) == []


HF = """#!{python}
import sys
from pathlib import Path
from huggingface_hub.cli import download, hf

def snapshot_download(repo_id, revision, allow_patterns, local_dir, **_):
    Path(local_dir).mkdir(parents=True)
    names = {{pattern.replace("*", "config") for pattern in allow_patterns}}
    for name in names - {{"{missing}"}}:
        (Path(local_dir) / name).write_text(f"{{repo_id}} {{revision}}")
    return local_dir

download.snapshot_download = snapshot_download
hf.main()
"""


@pytest.mark.parametrize("missing", ["", "config.json", "config.safetensors"])
def test_models_are_downloaded_with_all_files_for_loading(tmp_path: Path, missing: str) -> None:
    """Uses the command line of the hub with a replaced download."""
    for name, content in (("python3.11", "#!/bin/sh\n"), ("hf", HF.format(python=sys.executable, missing=missing))):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    script = ROOT / "tools" / "fetch_models.sh"
    done = subprocess.run(
        [script, tmp_path / "models", "org/name@abc"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True
    )
    assert (done.returncode == 0) is (missing == ""), done.stderr
    if not missing:
        found = {path.name: path.read_text() for path in (tmp_path / "models" / "org" / "name").iterdir()}
        assert found == {f"config.{kind}": "org/name abc" for kind in ("json", "txt", "model", "safetensors")}
