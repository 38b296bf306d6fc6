"""Print the recall and the false drops of each rule's defaults.

    python -m benchmarks.rules [--rule NAME] [--data FOLDER] [--json]

A row says how many samples of a labelled set a rule drops, as a share with its 95 % Wilson interval. `--json` adds a
last line with all counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.rules import faces, language, near_duplicates, pattern, size
from benchmarks.rules.figures import SHARED_DATA, Figure, Sources

MEASUREMENTS: dict[str, Callable[[Sources], list[Figure]]] = {
    "near_duplicate": near_duplicates.measure,
    "language": language.measure,
    "pos_pattern": pattern.measure,
    "min_side": size.measure,
    "face_area": faces.measure,
}

HEADER = ("rule", "set", "question", "count", "share", "95 % interval", "goal")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", action="append", choices=sorted(MEASUREMENTS))
    parser.add_argument("--data", type=Path, default=SHARED_DATA)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sources = Sources(options.data)
    figures = [figure for rule in options.rule or MEASUREMENTS for figure in MEASUREMENTS[rule](sources)]
    print(table([figure.cells() for figure in figures]))
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures]))


if __name__ == "__main__":
    main()
