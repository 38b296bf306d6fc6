"""Draws clusters.svg: the importance of each cluster before and after stage 3.

Few clusters are drawn as pairs of bars, many as a curve whose area is their share of the copies.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import PercentFormatter

_TITLE = "Cluster importance before (share of the samples) and after (share of the copies)"
_MAX_BARS = 25  # more do not fit into 1000 px
_CURVE_STEPS = 100
_MAX_TASKS = 40
_MAX_NAME_LETTERS = 32
_SIMILARITY = "similarity_"
_BEFORE, _AFTER, _AIM = "#bbbbbb", "#0072b2", "#d55e00"  # distinct in grey and for colour-blind readers
_AIM_LABEL = "p(c): the share aimed at"
_FONT = "DejaVu Sans"  # comes with matplotlib, so the figure is the same everywhere
_STYLE = {
    "font.family": _FONT,
    "font.size": 10,
    "text.parse_math": False,  # a task's name may contain `$`
    "svg.hashsalt": "pairsift",  # otherwise ids are random
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def clusters_svg(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return an SVG of the rows of clusters.parquet (see `copies.cluster_rows`), given in any order.

    The upper plot shows, for each cluster, its share of the samples before copies are assigned, its share of the
    copies, and p(c), the target share of CIDS. The lower plot shows its similarity to each task. Clusters are sorted by
    p(c) per sample, in descending order; empty ones are omitted (our choice). Equal rows give identical bytes.
    """
    with style.context(["default", _STYLE]):
        content = io.BytesIO()
        clusters_figure(rows).savefig(content, format="svg", metadata={"Title": _TITLE, "Date": None, "Creator": None})
    return content.getvalue()


def clusters_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure that `clusters_svg` writes, 1000 px wide."""
    table = _Table([row for row in rows if row["size"]])
    shown_tasks = min(len(table.tasks), _MAX_TASKS)
    heights_inch = [4.2] + [0.7 + 0.26 * shown_tasks] * bool(shown_tasks)
    figure = Figure(figsize=(10, sum(heights_inch)), dpi=100, layout="constrained")
    figure.suptitle(_TITLE, fontweight="bold")
    axes = figure.subplots(len(heights_inch), sharex=True, squeeze=False, height_ratios=heights_inch)[:, 0]
    if not len(table.before):
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "No sample came as far as the clusters.", ha="center", va="center")
        return figure
    if len(table.before) <= _MAX_BARS:
        edges = _bars(axes[0], table)
        axes[-1].set_xlabel("cluster, most wanted first (by p(c) per sample)")
        axes[-1].tick_params(axis="x", labelrotation=90 if table.cluster.max() > 99 else 0)
    else:
        edges = _curve(axes[0], table)
        axes[-1].set_xlabel(
            f"share of the samples; {len(table.before):,} clusters, most wanted first (by p(c) per sample)"
        )
    if shown_tasks:
        _similarities(figure, axes[1], table, edges)
    return figure


class _Table:
    """The columns of the k non-empty clusters, in the order of the figure.

    `before`, `after` and `aim` are float64 (k,), shares with sum 1 (`after` has sum 0 if there are no copies). `tasks`
    maps names to similarities, float64 (k,), sorted by the increase of the mean similarity, largest first.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        def column(name: str) -> np.ndarray:
            return np.array([row[name] for row in rows], np.float64)

        sizes, copies, importance = column("size"), column("copies"), column("importance")
        self.samples, self.copies = int(sizes.sum()), int(copies.sum())
        wanted = np.round(importance * self.samples / sizes, 9)  # without CIDS, values differ only in their last bits
        order = np.lexsort((column("cluster"), -wanted))
        self.cluster = column("cluster").astype(np.int64)[order]
        self.before = sizes[order] / max(self.samples, 1)
        self.after = copies[order] / max(self.copies, 1)
        self.aim = importance[order]
        names = [name for name in (rows[0] if rows else ()) if name.startswith(_SIMILARITY)]
        similarities = {name.removeprefix(_SIMILARITY): column(name)[order] for name in names}
        self.tasks = dict(sorted(similarities.items(), key=lambda task: (-self._rise(task[1]), task[0])))

    @property
    def before_label(self) -> str:
        """The legend entry of the samples."""
        return f"before: {self.samples:,} samples"

    @property
    def after_label(self) -> str:
        """The legend entry of the copies."""
        return f"after: {self.copies:,} copies"

    def _rise(self, similarity: np.ndarray) -> float:
        return float(np.dot(self.after - self.before, similarity))


def _bars(axes: Axes, table: _Table) -> np.ndarray:
    """Draw two bars per cluster; return the edges (k + 1,) between clusters on the x axis."""
    centres = np.arange(len(table.before))
    before = axes.bar(centres - 0.2, table.before, 0.4, color=_BEFORE, label=table.before_label)
    after = axes.bar(centres + 0.2, table.after, 0.4, color=_AFTER, label=table.after_label)
    aim = axes.hlines(table.aim, centres - 0.42, centres + 0.42, color=_AIM, linewidth=2, label=_AIM_LABEL)
    tops = np.maximum.reduce([table.before, table.after, table.aim])
    for centre, top, ratio in zip(centres, tops, table.after / table.before, strict=True):
        axes.annotate(_times(ratio), (centre, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.margins(x=0.01, y=0.1)
    axes.set_ylabel("share of the total (×: after / before)")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xticks(centres, [str(cluster) for cluster in table.cluster])
    _legend(axes, [before, after, aim])
    return np.arange(len(centres) + 1) - 0.5


def _times(ratio: float) -> str:
    return f"×{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}"


def _curve(axes: Axes, table: _Table) -> np.ndarray:
    """Draw a step for each hundredth of the samples; return the edges of the steps on the x axis, in shares of the
    samples."""
    groups = _groups(table)
    before, after, aim = (np.bincount(groups, values) for values in (table.before, table.after, table.aim))
    edges = np.concatenate([[0.0], np.cumsum(before)])
    area = axes.stairs(after / before, edges, fill=True, color=_AFTER, label=table.after_label)
    steps = axes.stairs(aim / before, edges, color=_AIM, linewidth=1.5, label=_AIM_LABEL)
    line = axes.axhline(1, color=_BEFORE, linewidth=2, linestyle="--", label=table.before_label)
    axes.margins(x=0, y=0.05)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("after / before (area: share after)")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _legend(axes, [line, area, steps])
    return edges


def _legend(axes: Axes, handles: Sequence[Any]) -> None:
    """Put the legend above the plot, so that it covers no bar."""
    axes.legend(handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)


def _groups(table: _Table) -> np.ndarray:
    """Return the step of the curve that contains the middle of each cluster's samples: int64 (k,), without gaps."""
    middles = np.cumsum(table.before) - table.before / 2
    return np.unique((middles * _CURVE_STEPS).astype(np.int64), return_inverse=True)[1]


def _similarities(figure: Figure, axes: Axes, table: _Table, edges: np.ndarray) -> None:
    """Draw a row per task, labelled with its mean similarity over the samples and over the copies."""
    shown = list(table.tasks.items())[:_MAX_TASKS]
    groups = np.arange(len(table.before)) if len(edges) == len(table.before) + 1 else _groups(table)
    weight = np.bincount(groups, table.before)
    cells = [np.bincount(groups, table.before * values) / weight for _, values in shown]
    # Edges have the colour of their cells, because browsers would otherwise leave gaps between cells.
    mesh = axes.pcolormesh(edges, np.arange(len(shown) + 1), np.array(cells), cmap="cividis", edgecolors="face")
    axes.invert_yaxis()
    labels = [f"{_printable(name)}\n{_means(table, values)}" for name, values in shown]
    axes.set_yticks(np.arange(len(shown)) + 0.5, labels, fontsize=7)
    axes.tick_params(axis="y", length=0)
    hidden = len(table.tasks) - len(shown)
    title = "similarity to each task (its mean: samples → copies)"
    axes.set_title(f"{title}; {hidden:,} more tasks not shown" if hidden else title, fontsize=9, loc="left")
    figure.colorbar(mesh, ax=axes, label="cosine", pad=0.01, aspect=5 + 2 * len(shown))


def _means(table: _Table, values: np.ndarray) -> str:
    before, after = (np.dot(shares, values) for shares in (table.before, table.after))
    return f"{before:.2f} → {after:.2f}" if table.copies else f"{before:.2f}"


def _printable(name: str) -> str:
    """Return the name of a task on one line, shortened, and without characters that the font lacks."""
    letters = FT2Font(font_manager.findfont(_FONT)).get_charmap()
    known = "".join(c if c.isprintable() and ord(c) in letters else "\N{REPLACEMENT CHARACTER}" for c in name)
    return known if len(known) <= _MAX_NAME_LETTERS else known[: _MAX_NAME_LETTERS - 1] + "…"
