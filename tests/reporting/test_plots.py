"""The figures: which are drawn, what lies on a Pareto front, where labels go."""

from __future__ import annotations

import copy
import itertools
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from spectune.reporting.plots.curves import mean_line
from spectune.reporting.plots.labels import _spread
from spectune.results.arm_result import undominated
from tests.reporting.from_content import comparison_plots, write_reports
from tests.reporting.sample import ARMS, HOSTILE, RTL, sample
from tests.reporting.test_reporting import FULL, comparison, invented

NAMES = [
    "verdict",
    "differences",
    "quality-and-share",
    "quality-and-memory",
    "quality-and-time",
    "learning-curves",
    "learning-rates",
    "forgetting-and-quality",
    "data-curve",
]


def test_each_figure_lies_in_the_folder_as_svg_and_png(tmp_path: Path) -> None:
    paths = write_reports(sample(tmp_path), tmp_path)
    plots = {path.name for path in paths if path.parent.name == "plots"}
    assert plots == {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    for path in paths:
        if path.suffix == ".svg":
            text = " ".join(ET.parse(path).getroot().itertext())
            assert "LoRA (lora-2)" in text, path.name
        if path.suffix == ".png":
            pixels = np.asarray(imread(path))[..., :3]
            assert pixels.shape[1] >= 600
            assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.5, path.name


def test_figures_without_numbers_are_left_out(tmp_path: Path) -> None:
    names = [plot.name for plot in comparison_plots(comparison(FULL, invented()), tmp_path)]
    assert names == ["quality-and-share", "quality-and-memory", "quality-and-time", "forgetting-and-quality"]
    assert comparison_plots(comparison(invented()), tmp_path) == []


def test_the_numbers_beside_a_figure_are_those_of_the_tables(tmp_path: Path) -> None:
    plots = {plot.name: plot for plot in comparison_plots(sample(tmp_path), tmp_path)}
    lora = next(line for line in plots["quality-and-memory"].body if line[0] == "LoRA")
    assert lora[1:] == ["108 MB", "0.272 ±0.016", "yes"]
    assert ["LoRA", "0.272 ±0.016", "Full, DoRA"] in plots["verdict"].body
    full = [line for line in plots["differences"].body if line[0] == "DoRA"]
    assert full == [["DoRA", "+0.011", "-0.011", "+0.033", "+4%", "1.000", "no"]]
    assert plots["learning-rate-3"].description.count("high edge") == 1


def test_a_pair_is_turned_round_where_full_comes_second() -> None:
    case = sample()
    turned = copy.deepcopy(case)
    for pair in turned["verdict"]["pairs"]:
        pair["a"], pair["b"] = pair["b"], pair["a"]
        pair["difference"], pair["low"], pair["high"] = -pair["difference"], -pair["high"], -pair["low"]
    lines = []
    for each in (case, turned):
        [plot] = [plot for plot in comparison_plots(each, Path("nowhere")) if plot.name == "differences"]
        lines.append([line[:4] for line in plot.body])
    assert lines[0] == lines[1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_pareto(points: list[tuple[int, int]]) -> None:
    front = undominated(points, lambda p, q: p[0] <= q[0] and p[1] <= q[1] and p != q)
    for x, y in points:
        beaten = any((u < x and v <= y) or (u <= x and v < y) for u, v in points)
        assert ((x, y) in front) != beaten


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_are_spread_in_order_and_stay_inside(places: list[float]) -> None:
    found = _spread(sorted(places), gap=10, low=0, high=100)
    assert all(after - before >= 10 - 1e-9 for before, after in itertools.pairwise(found))
    assert found[0] >= 0
    assert found[-1] <= 100 + 1e-9


def test_labels_that_have_room_stay_where_they_are() -> None:
    assert _spread([5.0, 30.0, 80.0], gap=10, low=0, high=100) == [5.0, 30.0, 80.0]


def test_the_mean_over_seeds_is_taken_where_all_have_a_value() -> None:
    assert mean_line([[(1.0, 2.0), (2.0, 1.0)], [(1.0, 4.0)]]) == [(1.0, 3.0)]
    assert mean_line([[(1.0, 2.0)], [(3.0, 4.0), (5.0, 6.0)]]) == [(3.0, 4.0), (5.0, 6.0)]


def test_any_label_can_be_drawn(tmp_path: Path) -> None:
    labels = [r"$\frac{1}$", "a & b < c", RTL, HOSTILE, "x" * 300, "\ud800\x00\x1b[31m", "漢字🙂", ""]
    case: dict[str, Any] = sample(tmp_path)
    for entry in [*case["runs"], *case["arms"], *case["verdict"]["arms"]]:
        entry["label"] = labels[list(ARMS).index(entry["name"])]
    for path in write_reports(case, tmp_path):
        if path.suffix == ".svg":
            text = " ".join(ET.parse(path).getroot().itertext())
            assert r"$\frac{1}$" in text
            assert "a & b < c" in text
            assert "x" * 300 not in text


def test_numbers_that_are_not_there_stop_no_figure(tmp_path: Path) -> None:
    case = sample(tmp_path)
    for name in ("valid_loss", "judged_loss", "forgetting_kl_nats_per_token", "train_seconds"):
        next(run for run in case["runs"] if run["name"] == "bitfit")[name] = float("nan")
    case["verdict"]["arms"][2].update(low=None, high=None, mean=None)
    case["verdict"]["pairs"][0].update(difference=None, low=None, high=None)
    case["searches"]["lora"]["trials"] = []
    case["searches"]["full"].update(best=None, range=None)
    for trial in case["searches"]["adapter"]["trials"]:
        trial["valid_loss"] = None
    write_reports(case, tmp_path)


def test_more_arms_than_colours(tmp_path: Path) -> None:
    runs = [invented(name=f"lora-{n}", valid_loss=1.0 + n / 50, trainable_parameters=1000 * (n + 1)) for n in range(20)]
    write_reports(comparison(FULL, *runs), tmp_path)
    assert len(ARMS) < len(runs)
