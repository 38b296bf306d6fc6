"""A small pool, tiny models, and runs in separate process groups that can be killed at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import yaml

from tests.helpers import Members, sample_members, settings, tar_bytes, uid
from tests.transforms.models import tiny_models
from transforms.core.recipe import STAGES
from transforms.storage import files

ROOT = Path(__file__).parents[2]
SHARDS, SAMPLES = 6, 14
WORDS = "dog bench river table castle engine garden window picture bottle horse bridge candle market".split()
TWO_WORKERS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")

# Forked from a process that has imported everything, a run takes one second instead of ten.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pipeline.cli", "pipeline.runs.run", "pipeline.graphs", "pipeline.report.progress", __name__]
)


def _members(shard: int) -> Members:
    members = []
    for n in range(SAMPLES):
        number = shard * SAMPLES + n
        caption = f"a {WORDS[number % 14]} beside an old {WORDS[(number // 14 + n) % 14]} in the sun"
        metadata = {"uid": uid(number * 7919)}
        members += sample_members(f"{number:06d}", caption, number, metadata)
    if shard == 1:  # samples for every kind of dead letter
        members += sample_members("repeated", "a dog on the bench of another shard", 3, {"uid": uid(0)})
        members += [("broken.jpg", b"\xff\xd8 no picture"), ("broken.txt", b"a caption"), ("alone.txt", b"alone")]
        members += sample_members("near", "the same dog on the same bench again", 2)
    return members


def write_pool(folder: Path) -> Path:
    """Write six shards, one of them empty and one truncated."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        content = tar_bytes([] if shard == 4 else _members(shard))
        (folder / f"{shard:05d}.tar").write_bytes(content[: len(content) * 2 // 3] if shard == 3 else content)
    return folder


def write_recipe(folder: Path) -> Path:
    """Write a recipe with every rule and every model, using tiny models."""
    content = settings(
        name="chaos",
        cross_modality__flipped_clip={
            "model": str(tiny_models.save_clip(folder / "clip")), "keep_fraction": 0.9, "batch_size": 4
        },
        cross_modality__image_text_matching={
            "model": str(tiny_models.save_itm(folder / "itm")), "keep_fraction": 0.9, "batch_size": 4
        },
        cross_modality__digit={"model": str(tiny_models.save_digit(folder / "digit")), "batch_size": 4},
        single_modality__min_side={"min_px": 32},
        distribution_alignment__cids=...,
        distribution_alignment__clusters={"count": 4, "iterations": 5},
        distribution_alignment__semantic_dedup={"epsilon": 0.0001},
    )  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs and options of a run."""

    pool: Path
    recipe: Path
    beam_options: tuple[str, ...] = ()

    def command(self, output: Path, *more: str) -> list[str]:
        """Return the arguments of `pairsift`."""
        given = ["run", str(self.recipe), "--input", str(self.pool), "--output", str(output), "--json", *more]
        return [*given, "--", *self.beam_options]


def make_case(folder: Path) -> Case:
    """Write the pool and the recipe under `folder`."""
    return Case(write_pool(folder / "pool"), write_recipe(folder / "models"))


class Command:
    """`pairsift` with these arguments in a separate process group. Its output goes to `log`."""

    def __init__(self, arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> None:
        self.log = log
        self.log.unlink(missing_ok=True)
        self.process: ForkServerProcess = _FORKS.Process(target=_child, args=(arguments, str(log), before))
        self.process.start()
        while self.process.is_alive() and not self.log.exists():
            time.sleep(0.001)

    def finish(self, seconds: float = 300) -> int:
        """Wait for the process and return its exit status."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill(self) -> None:
        """Send SIGKILL to all processes of the group."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def said(self) -> str:
        """The output so far."""
        return self.log.read_text()

    @property
    def stage(self) -> int:
        """The number of finished stages."""
        return self.said.count('"stage_done"')


class Run(Command):
    """A run over local folders."""

    def __init__(self, case: Case, output: Path, *more: str, before: Callable[[], None] | None = None) -> None:
        self.output = output
        super().__init__(case.command(output, *more), output.with_name(f"{output.name}.log"), before)


def _child(arguments: list[str], log: str, before: Callable[[], None] | None) -> None:
    os.setsid()
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if before:
        before()

    from pipeline.cli import app

    app(arguments)


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill a run, within a given stage.

    That is after a share of the stage's usual time, when its n-th file appears, or while it writes its n-th temporary
    file, with n = `amount`.
    """

    stage: int
    after: str
    amount: float

    def __str__(self) -> str:
        unit = {"share": "of its time", "files": "new files", "asides": "files aside"}[self.after]
        return f"{STAGES[self.stage]}, {round(self.amount, 2)} {unit}"


@dataclasses.dataclass(frozen=True)
class Reference:
    """The outputs of an undisturbed run, and the seconds of its stages."""

    output: Path
    tree: dict[str, str]
    seconds: tuple[float, ...]


def moments(seed: int, count: int) -> list[Moment]:
    """Return moments of all kinds in all stages, in a seeded random order."""
    rng = random.Random(seed)
    draws = {"asides": lambda: rng.randint(1, 12), "share": rng.random, "files": lambda: rng.randint(1, 9)}
    drawn = []
    for n in range(count):
        after = list(draws)[n // len(STAGES) % len(draws)]
        drawn.append(Moment(n % len(STAGES), after, draws[after]()))
    rng.shuffle(drawn)
    return drawn


def kill_at(run: Run, moment: Moment, seconds: tuple[float, ...]) -> bool:
    """Kill the run at that moment. Returns False if it ended before."""
    while run.process.is_alive() and run.stage < moment.stage:
        time.sleep(0.002)
    started, before = time.monotonic(), set(_names(run.output))
    new: set[str] = set()
    while run.process.is_alive():
        new |= set(_names(run.output)) - before
        asides = sum(map(files.is_aside, new))
        reached = {
            "share": (time.monotonic() - started) / seconds[moment.stage],
            "files": len(new) - asides,
            "asides": asides,
        }
        if reached[moment.after] >= moment.amount:
            with contextlib.suppress(ProcessLookupError):
                run.kill()
            return run.process.exitcode == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def _names(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (f"{place}/{name}" for name in names)


def tree(output: Path) -> dict[str, str]:
    """Return the sha256 of each output file by path; for run.json, which contains times, an empty string.

    Versions must be equal and are listed as one, because a run that was killed late leaves an additional one.
    """
    found: dict[str, str] = {}
    for name in sorted(_names(output)):
        relative = re.sub("^versions/[0-9]+/", "versions/any/", os.path.relpath(name, output))
        digest = "" if relative == "run.json" else hashlib.sha256(Path(name).read_bytes()).hexdigest()
        assert found.setdefault(relative, digest) == digest, name
    return found


def undisturbed(case: Case, output: Path) -> Reference:
    """Run without interruption."""
    run = Run(case, output)
    assert run.finish() == 0, run.said
    seconds = json.loads((output / "run.json").read_text())["seconds"]
    return Reference(output, tree(output), tuple(seconds[stage] for stage in STAGES))
