"""Tests of the figure of the clusters: its content, its layout at any number of clusters, and its reproducibility."""

from __future__ import annotations

import itertools
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from pipeline.output_folder.layout import Layout
from pipeline.report.clusters import _STYLE, clusters_figure, clusters_svg
from pipeline.sinks.clusters import WriteClusters

SVG = "{http://www.w3.org/2000/svg}"


def row(cluster: int, size: int, importance: float, copies: int, **similarities: float) -> dict[str, Any]:
    named = {f"similarity_{task}": value for task, value in similarities.items()}
    return {
        "cluster": cluster, "size": size, "semantic_duplicates": 0, **named, "importance": importance,
        "expected_copies": float(copies), "digit_addition": 0.0, "copies": copies,
    }  # fmt: skip


def many(count: int, tasks: tuple[str, ...] = ("digits", "animals"), first: int = 0) -> list[dict[str, Any]]:
    """Return clusters of many sizes. CIDS weights some fifty times as much as others; every twelfth is empty."""
    rng = np.random.default_rng(0)
    sizes = np.where(np.arange(count) % 12 == 11, 0, rng.integers(1, 200, count))
    similarity = {task: rng.uniform(0, 0.4, count) for task in tasks}
    weights = sizes * np.exp(sum(similarity.values(), np.zeros(count)) / 0.1)
    p = weights / weights.sum()
    copies = np.round(sizes.sum() * p).astype(int).tolist()
    return [
        row(first + c, int(sizes[c]), float(p[c]), copies[c], **{t: float(s[c]) for t, s in similarity.items()})
        for c in range(count)
    ]


def drawn(rows: list[dict[str, Any]]) -> Figure:
    """Return the figure after its layout."""
    with style.context(["default", _STYLE]):
        figure = clusters_figure(rows)
        FigureCanvasAgg(figure).draw()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def lowest(figure: Figure) -> Axes:
    return figure.axes[min(1, len(figure.axes) - 1)]


def steps_of(axes: Axes) -> list[StepPatch]:
    return [patch for patch in axes.patches if isinstance(patch, StepPatch)]


def tick_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in lowest(figure).get_xticklabels()]


def test_bars_show_shares_of_samples_and_copies_sorted_by_importance() -> None:
    figure = drawn([
        row(0, 60, 0.2, 10, digits=0.1), row(1, 10, 0.5, 25, digits=0.9), row(2, 0, 0.0, 0, digits=0.95),
        row(3, 30, 0.3, 15, digits=0.5),
    ])  # fmt: skip
    before, after = (c for c in figure.axes[0].containers if isinstance(c, BarContainer))
    assert tick_labels(figure) == ["1", "3", "0"]  # by p(c) per sample, without the empty cluster
    assert [bar.get_height() for bar in before] == pytest.approx([0.1, 0.3, 0.6])
    assert [bar.get_height() for bar in after] == pytest.approx([0.5, 0.3, 0.2])
    shown = texts(figure)
    assert {"×5.0", "×1.0", "×0.33", "before: 100 samples", "after: 50 copies"} <= set(shown)
    assert "digits\n0.30 → 0.62" in shown  # .1·.9 + .3·.5 + .6·.1; .5·.9 + .3·.5 + .2·.1
    assert any(text.startswith("Cluster importance before") for text in shown)
    assert all(axes.get_ylabel() for axes in (figure.axes[0], figure.axes[-1]))  # shares; the cosine of the colour bar


def test_area_of_the_curve_of_many_clusters_is_the_share_of_the_copies() -> None:
    rows = many(5000)
    axes = drawn(rows).axes[0]
    area, aim = steps_of(axes)
    for steps in (area, aim):
        heights, edges, _ = steps.get_data()
        assert len(heights) <= 100
        assert np.all(np.diff(edges) > 0) and edges[-1] == pytest.approx(1)
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
    heights, edges, _ = aim.get_data()
    assert np.all(np.diff(heights) <= 1e-9)  # in descending order
    wanted = sorted((r for r in rows if r["size"]), key=lambda r: -r["importance"] / r["size"])
    samples = sum(r["size"] for r in rows)
    cumulated = np.cumsum([r["size"] for r in wanted]) / samples
    upper_half = sum(r["copies"] for r, share in zip(wanted, cumulated, strict=True) if share <= edges[50] + 1e-12)
    heights = area.get_data()[0]
    assert np.sum((heights * np.diff(edges))[:50]) == pytest.approx(upper_half / sum(r["copies"] for r in rows))


def test_large_cluster_among_small_ones_is_one_wide_step() -> None:
    figure = drawn([*many(200), row(200, 1_000_000, 0.5, 100, digits=0.0, animals=0.0)])
    edges = steps_of(figure.axes[0])[0].get_data()[1]
    assert np.diff(edges).max() > 0.95


@pytest.mark.parametrize("rows", [
    many(1), many(3), many(24), many(27), many(27, first=999_000), many(28), many(1000), many(24, ()), many(1000, ()),
    many(24, tuple(f"a task whose name is long {n}" for n in range(60))), [{**r, "copies": 0} for r in many(24)],
])  # fmt: skip
def test_no_text_overlaps_or_exceeds_the_figure(rows: list[dict[str, Any]]) -> None:
    figure = drawn(rows)
    page, all_of_it = figure.bbox_inches, figure.get_tightbbox()
    assert all_of_it.x0 >= -0.01 and all_of_it.x1 <= page.x1 + 0.01
    assert all_of_it.y0 >= -0.01 and all_of_it.y1 <= page.y1 + 0.01
    top, bottom = figure.axes[0], lowest(figure)
    legend = top.get_legend()
    assert legend is not None and legend.get_window_extent().y0 >= top.bbox.y1 - 1
    labels = [label for label in bottom.get_xticklabels() if label.get_text() and label.get_visible()]
    for groups in (labels, bottom.get_yticklabels() if bottom is not top else [], top.texts):
        boxes = [label.get_window_extent() for label in groups]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_figure_without_samples() -> None:
    for rows in ([], [row(0, 0, 0.0, 0)]):
        assert any("No sample" in text for text in texts(drawn(rows)))


def test_bytes_do_not_depend_on_the_order_of_rows_or_matplotlib_settings() -> None:
    for count in (24, 500):
        rows = many(count)
        svg = clusters_svg(rows)
        with matplotlib.rc_context({"font.size": 30.0, "svg.hashsalt": None, "text.usetex": True}):
            assert clusters_svg(random.Random(0).sample(rows, count)) == svg
        assert b"date" not in svg.lower()
    assert matplotlib.rcParams["svg.hashsalt"] is None  # global settings are unchanged


@pytest.mark.parametrize("name", [
    "$x_", "$\\frac$", "a$b$c", "<script>alert(1)</script>", "]]>", "--><b>", "a\nb\x00", "数字", "\u202egnp.exe", "",
])  # fmt: skip
def test_task_name_is_not_interpreted(name: str) -> None:
    rows = many(3, (name,))
    shown = [text.splitlines()[0] for text in texts(drawn(rows)) if "→" in text and "samples" not in text]
    assert len(shown) == 1 and shown[0].isprintable()
    if name.isascii() and name.isprintable() and name:
        assert shown == [name]
    found = {element.tag for element in ElementTree.fromstring(clusters_svg(rows)).iter()}
    assert not found & {f"{SVG}script", f"{SVG}b", "script", "b"}


def test_long_name_is_shortened() -> None:
    assert f"{'x' * 31}…" in "\n".join(texts(drawn(many(3, ("x" * 500,)))))


def test_more_tasks_than_fit_are_counted() -> None:
    assert any("; 5 more tasks not shown" in text for text in texts(drawn(many(24, tuple(map(str, range(45)))))))


def test_file_size_is_bounded() -> None:
    assert len(clusters_svg(many(50_000))) < 200_000


def test_figure_is_written_next_to_the_table(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    rows = many(24)
    assert list(WriteClusters(layout).process(rows)) == [layout.clusters]
    assert pq.read_table(tmp_path / "clusters.parquet").to_pylist() == rows
    assert (tmp_path / "clusters.svg").read_bytes() == clusters_svg(rows)
    assert len(list(tmp_path.iterdir())) == 2
