"""Tests of the dashboard: its format, and that it shows all of pairsift's metrics and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud.monitoring_dashboard_v1 import Dashboard
from google.protobuf.json_format import ParseError

from transforms.core.metrics import PREFIXES, all_metrics

PATH = Path(__file__).parents[3] / "templates" / "dashboard.json"
OF_DISTRIBUTION = ("_MAX", "_MIN", "_MEAN", "_COUNT")  # of the scalars that Dataflow reports for a distribution


def filters() -> Iterator[str]:
    for tile in Dashboard.from_json(PATH.read_text()).mosaic_layout.tiles:
        for data_set in tile.widget.xy_chart.data_sets:
            yield data_set.time_series_query.time_series_filter.filter


def test_dashboard_has_the_official_type() -> None:
    dashboard = Dashboard.from_json(PATH.read_text())
    assert dashboard.display_name == "pairsift"
    with pytest.raises(ParseError):
        Dashboard.from_json(PATH.read_text().replace("xyChart", "xyChar"))


def test_tiles_fill_the_grid_and_do_not_overlap() -> None:
    layout = Dashboard.from_json(PATH.read_text()).mosaic_layout
    taken = [
        (x, y)
        for tile in layout.tiles
        for x in range(tile.x_pos, tile.x_pos + tile.width)
        for y in range(tile.y_pos, tile.y_pos + tile.height)
    ]
    assert len(taken) == len(set(taken)) == layout.columns * (max(y for _, y in taken) + 1)
    assert max(x for x, _ in taken) < layout.columns


def test_dashboard_shows_exactly_the_metrics_of_pairsift() -> None:
    asked: set[str] = set()
    for text in filters():
        known, quoted = re.fullmatch(
            r'resource\.type="dataflow_job" metric\.type="dataflow\.googleapis\.com/job/user_counter" '
            r'metric\.label\."metric_name"=(one_of|starts_with|)\(?(".*")\)?', text
        ).groups()  # type: ignore[union-attr]  # fmt: skip
        for name in re.findall(r'"([^"]*)"', quoted):
            if known == "starts_with":
                assert name in PREFIXES
                asked.add(name)
                continue
            metric = all_metrics().get(name)
            if metric is None:
                name, _, part = name.rpartition("_")
                metric = all_metrics()[name]
                assert metric.kind == "distribution" and f"_{part}" in OF_DISTRIBUTION
            else:
                assert metric.kind == "counter"
            asked.add(metric.name)
    assert asked == all_metrics().keys() | set(PREFIXES)
