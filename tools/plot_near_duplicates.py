"""Draw docs/assets/near-duplicates.svg: what is found as the limits of `near_duplicate` change.

    python -m tools.plot_near_duplicates [--data FOLDER] [--output FILE]

Needs matplotlib. The copies are those of OpenStax pictures that the settings were not chosen on (`benchmarks.rules`).
The other limit has its default, which a dotted line marks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.rules.figures import SHARED_DATA, Sources
from benchmarks.rules.near_duplicates import COPIES, copies_of
from transforms.single_modality.near_duplicate import NearDuplicateSettings

KINDS = list(COPIES)[:6]
HAMMING = range(17)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED_DATA)
    parser.add_argument("--output", type=Path, default=Path("docs/assets/near-duplicates.svg"))
    options = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "near-duplicates", "svg.fonttype": "none"}
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    copies = copies_of(Sources(options.data), "OpenStax pool", chosen_on=False)
    for panel, name, values in zip(panels, ("max_hamming", "max_cell_steps"), (HAMMING, range(4)), strict=True):
        for kind in KINDS:
            found = [copies[kind].within(NearDuplicateSettings(**{name: value})).mean() for value in values]
            panel.plot(values, found, marker=".", label=kind)
        panel.axvline(getattr(NearDuplicateSettings(), name), color="grey", linestyle=":")
        panel.set_xlabel(name)
        panel.set_xticks(list(values)[:: max(1, len(values) // 8)])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of copies found")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
