"""Curves of one run and of several: which are drawn, their scales, and the numbers behind them."""

from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest

from sop_jax.page import charts
from sop_jax.page.charts import Chart
from sop_jax.page.curves import LISTED, POINTS, curves
from sop_jax.page.runs import Shown


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with matplotlib.rc_context(charts.STYLE):
        yield


def shown(name: str, rows: list[dict[str, Any]]) -> Shown:
    return Shown(name, name, rows, None, {}, {}, [])


def logged(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 8 - step / count, "cls": 4.0, "log_k": 4.5, "lr": 0.1} | changes
        for step in range(1, count + 1)
    ]


def drawn(*runs: Shown) -> dict[str, tuple[Chart, str]]:
    return {chart.name: (chart, table) for chart, table in curves(list(runs))}


def test_only_what_was_logged_is_drawn() -> None:
    found = drawn(shown("a", [{"step": 0, "knn_top1": 0.5}, *logged(4)]))
    assert list(found) == ["curve-knn", "curve-loss", "curve-optimization"]
    loss, table = found["curve-loss"]
    titles = [axis.get_title(loc="left") for axis in loss.figure.axes]
    assert titles == ["loss", "views (cls)"]
    assert loss.figure.axes[1].lines[1].get_linestyle() == ":"  # ln K
    assert "loss: from 7.75 at step 1 to 7 at step 4, between 7 and 7.75" in loss.alt
    assert table.count("<tr>") == 1 + 4 and "<td>7.75</td>" in table
    knn, _ = found["curve-knn"]
    assert "k-NN top-1, %: 50 at step 0" in knn.alt


def test_nothing_is_drawn_of_no_rows() -> None:
    assert drawn(shown("a", [])) == {}
    assert drawn(shown("a", [{"step": 1, "loss": None}, {"step": 2, "loss": "x"}])) == {}


def test_a_schedule_that_does_not_change_is_left_out() -> None:
    rows = [row | {"momentum": 0.99, "weight_decay": row["step"]} for row in logged(3)]
    chart, _ = drawn(shown("a", rows))["curve-optimization"]
    titles = [axis.get_title(loc="left") for axis in chart.figure.axes]
    assert titles == ["learning rate", "weight decay"]


def test_several_runs_share_a_chart_and_have_a_table_each() -> None:
    found = drawn(shown("short", logged(3)), shown("long <b>", logged(30, mim=2.0)))
    chart, table = found["curve-loss"]
    first, _, mim = chart.figure.axes
    assert first.get_xlim() == mim.get_xlim()
    assert len(first.lines) == 2 and [line.get_label() for line in first.lines][1] == "long <b>"
    assert len(first.lines[0].get_xdata()) == 3 and len(first.lines[1].get_xdata()) == 30
    assert len(mim.lines[0].get_xdata()) == 0
    assert table.count("<table>") == 2 and "long &lt;b&gt;, 20 of 30 steps" in table
    assert "short, loss" in chart.alt and "short, masked" not in chart.alt
    assert "long &lt;b&gt;" in charts.svg(chart)


def test_long_curves_are_averaged_with_their_range() -> None:
    rows = logged(4 * POINTS)
    rows[7]["loss"] = 20.0
    chart, table = drawn(shown("a", rows))["curve-loss"]
    axis = chart.figure.axes[0]
    assert len(axis.lines[0].get_xdata()) == POINTS and axis.collections
    assert axis.lines[0].get_ydata().max() < 20 and "at most 300" in chart.caption
    assert table.count("<tr>") == 1 + LISTED and ">1,200<" in table


def test_outliers_do_not_set_the_scale() -> None:
    rows = logged(200)
    rows[0]["loss"] = 1000.0
    chart, _ = drawn(shown("a", rows))["curve-loss"]
    assert chart.figure.axes[0].get_ylim()[1] < 20
    assert "cut off: loss" in chart.caption and "1000" in chart.alt


def test_shares_are_percent_and_begin_at_zero() -> None:
    rows = [{"step": step, "loss": 1.0, "idle_share": 0.5, "images_per_s": 90.0} for step in (1, 2)]
    chart, _ = drawn(shown("a", rows))["curve-speed"]
    speed, idle = chart.figure.axes
    assert np.allclose(idle.lines[0].get_ydata(), 50) and idle.get_ylim()[0] == 0
    assert speed.get_ylim()[0] == 0 and speed.get_ylim()[1] > 90


def test_the_bound_of_agreement_is_the_ratio_of_temperatures() -> None:
    row = {"loss": 1.0, "agreement": 0.5, "teacher_temperature": 0.02, "student_temperature": 0.1}
    rows = [{"step": step} | row for step in (1, 2)]
    chart, _ = drawn(shown("a", rows))["curve-embeddings"]
    assert np.allclose(chart.figure.axes[0].lines[1].get_ydata(), 0.2)


def test_further_evaluations_have_a_chart() -> None:
    rows = [{"step": 0, "logistic_top1": 0.25}, {"step": 5, "logistic_top1": 0.75}]
    chart, _ = drawn(shown("a", rows))["curve-others"]
    assert "logistic top-1, %: from 25 at step 0 to 75" in chart.alt
