"""The pictures of a report: nothing hides what was measured, and all of it is there."""

import copy
import json
import math
import re
from collections import Counter
from functools import cache
from html import escape
from pathlib import Path

import pytest

from rigpt_hf.evaluation.harness.figures import drawn, figure
from rigpt_hf.evaluation.harness.overview import MOST, overview
from rigpt_hf.evaluation.harness.report import as_html
from rigpt_hf.evaluation.harness.tables import measure_of, verdict
from rigpt_hf.evaluation.measures import MEASURES
from rigpt_hf.evaluation.numbers import plain


RESULTS = Path(__file__).parents[2] / "evaluation/results"
LONG = "a model with a name that is as long as the name of a checkpoint in a folder of a folder, step 120000"


@cache
def kept(name: str) -> str:
    return (RESULTS / f"evaluate_{name}.json").read_text()


def committed(name: str = "rigpt", models: int = 2) -> dict:
    """Results as they lie in the repository, or as they would be of the first model alone."""
    results = json.loads(kept(name))
    if models == 1:
        (own, _) = results["models"]
        results["models"], results["baseline"] = {own: results["models"][own]}, None
        for task in results["tasks"]:
            task["models"] = {own: task["models"][own]}
            for quantity in task["quantities"]:
                quantity["models"] = {own: quantity["models"][own]}
                quantity.pop("difference", None)
    return results


@cache
def page(models: int) -> str:
    return as_html(committed(models=models))


def of(results: dict, metric: str) -> dict:
    return next(task for task in results["tasks"] if task["metric"] == metric)


def picture(results: dict, metric: str):
    title, words, found = drawn(of(results, metric), list(results["models"]))
    assert title and words
    return found


def task(metric: str, models: dict, quantities: list | None = None) -> dict:
    return {"task": metric, "metric": metric, "models": models, "quantities": quantities or []}


def labels(found) -> list[str]:
    (legend,) = found.legends
    return [text.get_text() for text in legend.get_texts()]


def seen(axis) -> list[str]:
    """Labels of the ticks that lie in the picture."""
    low, high = sorted(axis.get_view_interval())
    return [
        text.get_text()
        for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if low <= place <= high
    ]


@pytest.mark.parametrize("metric", MEASURES)
@pytest.mark.parametrize("name", [pytest.param("RiGPT", marks=pytest.mark.full), LONG], ids=["short", "long"])
@pytest.mark.by_default(2)
def test_legends_lie_outside_of_the_axes(metric, name):
    found = picture(json.loads(kept("rigpt").replace('"RiGPT"', json.dumps(name))), metric)
    found.draw_without_rendering()
    (legend,) = found.legends
    box = legend.get_window_extent()
    assert not any(axes.get_legend() for axes in found.axes)
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in found.axes)
    # Inside of the picture, too.
    assert box.x0 >= 0 and box.x1 <= found.bbox.x1 and box.y1 <= found.bbox.y1
    # The negative control.
    within = found.axes[0].legend(["x"])
    found.draw_without_rendering()
    assert any(within.get_window_extent().overlaps(axes.get_tightbbox()) for axes in found.axes)


def test_costs_below_zero_are_drawn_as_they_are():
    increases = {"W8A8": -0.04, "W4A8": 0.2, "W4A4": 3.0}
    rounded = {"identity": {scheme: {"increase": value} for scheme, value in increases.items()}}
    values = {"a": {"value": -0.04, "low": -0.07, "high": 0}}
    quantity = {"name": "loss of W8A8, identity", "unit": "", "models": values}
    results = task("quantization_robustness", {"a": {"rounded": rounded}}, [quantity])
    _, _, found = drawn(results, ["a"])
    (axes,) = found.axes
    lines = {tuple(line.get_ydata()) for line in axes.get_lines()}
    assert tuple(increases.values()) in lines and (-0.07, 0) in lines and (0, 0) in lines
    low, high = axes.get_ylim()
    assert low < -0.07 < 3 < high
    found.draw_without_rendering()
    assert seen(axes.yaxis) == ["−0.01", "−0.001", "0", "0.001", "0.01", "0.1", "1"]


def test_one_model_has_its_speeds():
    results = committed(models=1)
    found, measured = picture(results, "throughput"), of(results, "throughput")["models"]["RiGPT"]
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")
    for axes, key in zip(found.axes, keys, strict=True):
        (bar,) = axes.patches
        assert bar.get_width() == measured[key]["median"] != 1
        (line,) = axes.get_lines()
        assert list(line.get_xdata()) == [measured[key]["lower"], measured[key]["upper"]]
        assert axes.get_xlim()[1] > measured[key]["upper"]
        (text,) = axes.texts
        assert float(text.get_text()) == pytest.approx(bar.get_width(), rel=1e-3)
    both = picture(committed(), "throughput").axes[0]
    assert len(both.patches) == len(both.texts) == 2


def test_all_dtypes_are_drawn_and_so_is_no_error_at_all():
    dtypes = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    errors = {frame: {each: {"largest": 10.0**-power} for power, each in enumerate(dtypes)} for frame in ("a", "b")}
    errors["shift"] = {each: {"largest": 0.0} for each in dtypes[:-1]} | {dtypes[-1]: {"largest": None}}
    _, words, found = drawn(task("invariance", {"x": {"errors": errors}}), ["x"])
    (axes,) = found.axes
    assert labels(found) == [f"x, {each}" for each in dtypes]
    lines = axes.get_lines()
    assert len({line.get_marker() for line in lines}) == len(lines) == len(dtypes)
    low, high = axes.get_xlim()
    for power, line in enumerate(lines):
        assert list(line.get_xdata())[:2] == [10.0**-power] * 2
        # On a logarithmic axis zero would be nowhere.
        values = axes.transData.transform([(value, 0) for value in line.get_xdata() if not math.isnan(value)])
        assert all(math.isfinite(each) for pair in values for each in pair) and low < 0 < 1 < high
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "shift"]
    assert all(each in words for each in dtypes)
    del errors["shift"]
    _, _, found = drawn(task("invariance", {"x": {"errors": errors}}), ["x"])
    assert found.axes[0].get_xscale() == "log"


def test_axes_of_kurtosis_can_be_read():
    for values, scale, ticks in (
        ((-0.35, 0.089, 0.2), "linear", ["−0.2", "0", "0.2"]),
        ((70, 90, 222), "linear", ["0", "50", "100", "150", "200"]),
        ((-0.2, 0.3, 0.1, 9000), "symlog", ["0", "1", "10", "100", "1,000", "10,000"]),
        ((-30, 0.3, 0.1, 200), "symlog", ["−10", "−1", "0", "1", "10", "100"]),
    ):
        layers = [{"per_token": {"excess_kurtosis": value}} for value in values]
        stream = [{"all": layer, "without_first": layer} for layer in layers]
        _, words, found = drawn(task("outliers", {"a": {"stream": stream}}), ["a"])
        (axes,) = found.axes
        found.draw_without_rendering()
        assert axes.get_yscale() == scale and seen(axes.yaxis) == ticks
        low, high = axes.get_ylim()
        assert low < min(0, *values) and max(values) < high
        # Whoever does not see it reads the numbers, which stand in no table.
        assert "a: " in words and "without the first position" in words


def test_ticks_are_written_by_hand():
    written = {0.30000000000000004: "0.3", -1e-15: "−1e−15", 2e7: "2e+07", -0.001: "−0.001", 1000: "1,000", 0: "0"}
    assert {value: plain(value) for value in written} == written


def test_each_quantity_has_an_axis_of_its_own():
    """Perplexity and bits per byte have nothing in common."""
    results = committed()
    del of(results, "perplexity")["quantities"][1]["models"]["RiGPT"]
    found = picture(results, "perplexity")
    assert [axes.get_title("left") for axes in found.axes] == ["perplexity (per token)", "bits per byte (bits)"]
    for axes, low, high in zip(found.axes, (21.5, 2.083), (95.4, 2.1399), strict=True):
        left, right = axes.get_xlim()
        # All is inside, and fills more than half.
        assert left < low < high < right < left + 2 * (high - low)
    assert labels(found) == ["RiGPT", "stock GPT-2"]
    for each in results["tasks"][0]["quantities"]:
        for entry in each["models"].values():
            entry.pop("low", None)
    assert drawn(results["tasks"][0], list(results["models"])) is None


def test_a_picture_fills_its_place_and_says_what_it_is():
    name = 'a<b> & $c$ "d" $'
    models = {name: of(committed(), "throughput")["models"]["RiGPT"]}
    title, svg = figure(task("throughput", models) | {"task": name}, [name])
    opening = svg.partition(">")[0]
    assert svg.startswith("<svg") and 'width="100%"' in opening and " height=" not in opening
    assert re.search(r'viewBox="0 0 \d', opening) and 'role="img"' in opening
    assert f"<title>{escape(f'{name}: {title}', quote=False)}</title>" in svg.replace("&#34;", '"')
    assert "aria-label=" in opening and "<desc>" in svg and "<metadata>" not in svg and "http://purl" not in svg


@pytest.mark.full
def test_names_of_pictures_do_not_meet_in_a_page():
    text = page(2)
    names = Counter(re.findall(r'\bid="([^"]+)"', text))
    assert len(names) > 100 and max(names.values()) == 1
    # Each that is asked for is there.
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(names)


@pytest.mark.parametrize("name", ["rigpt", "converted", "smollm2"])
def test_the_overview_has_a_row_for_every_difference(name):
    results = committed(name)
    tested = [
        (each["task"], measure_of(each).words(quantity["name"]).removeprefix("added loss, "), verdict(quantity))
        for each in results["tasks"]
        for quantity in each["quantities"]
        if "difference" in quantity
    ]
    panels = overview(results)
    rows = [row for panel in panels for row in panel.rows]
    assert Counter(tested) == Counter((row.task, row.name.removesuffix("*"), row.verdict) for row in rows)
    assert 10 < len(rows) <= MOST
    assert sum(len(rows) for panel in panels for _, rows in panel.groups()) == len(tested)
    for panel in panels:
        assert [text for _, text in panel.ticks].count("0") == 1 and (panel.zero, "0") in panel.ticks
        for row in panel.rows:
            assert 0 <= row.low <= row.value <= row.high <= 100, row
            if row.verdict != "no difference shown":
                assert (row.value > panel.zero) is (row.verdict == "better"), row


def test_the_overview_says_what_was_measured():
    """Numbers with the sign of the table, whichever side is better, and two units are not added."""
    panels = {panel.title: {(row.task, row.name): row for row in panel.rows} for panel in overview(committed())}
    percent, points, nats = panels.values()
    assert list(panels) == ["in percent of stock GPT-2's", "in percentage points", "in nats per token"]
    assert percent["perplexity", "bits per byte"].text == f"−{100 * 0.65649 / 2.11092:.1f} %"
    assert percent["throughput", "decoding"].text == "−20.6 %" and percent["throughput", "decoding"].kind == "worse"
    # The speed is the table's, 1.100 times the baseline's; a time is less then.
    assert percent["throughput", "time to first token"].text == "−9.1 %"
    assert percent["throughput", "time to first token"].bounds == "−13.3 to −4.7"
    assert percent["throughput", "time to first token"].value > percent["throughput", "decoding"].value
    assert points["last word", "accuracy"].text == "+14.4"
    assert points["last word", "accuracy"].bounds == "+10.9 to +18.1"
    assert nats["quantization_robustness", "4-bit weights and activations, principal axes*"].text == "+0.189"
    assert nats["quantization_robustness", "8-bit weights and activations, own frame"].kind == "none"
    assert {name.endswith("*") for _, name in nats if "own frame" not in name} == {True}


def test_differences_of_nothing_stay_at_zero():
    """The rounding of a conversion fills no axis."""
    panels = overview(committed("smollm2"))
    rows = [(panel, row) for panel in panels for row in panel.rows if row.text in ("0", "≈ 0")]
    assert len(rows) > 15
    assert all(
        row.high - row.low < 0.1 and abs(row.value - panel.zero) < 0.1 and not row.bounds for panel, row in rows
    )


def one(metric="lm-eval", **quantity) -> dict:
    difference = {"value": 0.25, "low": 0.1, "high": 0.4, "p_value": 0.001, "significant": True, "kind": "difference"}
    values = {"a": {"value": 0.25}, "b": {"value": 0.0}}
    quantity = {"name": "f1", "unit": "", "better": "more", "models": values, "difference": difference} | quantity
    return {"baseline": "b", "tasks": [task(metric, {}, [quantity])]}


def test_a_baseline_of_zero_has_no_percentages():
    (panel,) = overview(one())
    assert panel.title == "as measured" and panel.rows[0].text == "+0.250"
    (panel,) = overview(one(models={"a": {"value": 0.75}, "b": {"value": 0.5}}))
    assert panel.title == "in percent of b's" and panel.rows[0].text == "+50.0 %"
    (panel,) = overview(one(name="acc_norm (none)"))
    assert panel.title == "in percentage points" and panel.rows[0].text == "+25.0"
    # Where nobody knows which is better, right is more.
    (panel,) = overview(one(better=""))
    assert not panel.is_directed and panel.rows[0].kind == "other" and panel.rows[0].value > panel.zero
    results = one()
    results["tasks"][0]["quantities"][0]["difference"] |= dict.fromkeys(("value", "low", "high")) | {
        "significant": False
    }
    (row,) = overview(results)[0].rows
    assert (row.value, row.low, row.high, row.text, row.bounds) == (None, None, None, "–", "")


def test_of_very_many_differences_those_that_hold_are_shown():
    results = committed()
    many = copy.deepcopy(of(results, "multiple_choice")["quantities"][0])
    many["difference"] |= {"significant": False, "value": 0.0, "low": -0.3, "high": 0.01}
    results["tasks"].append(task("lm-eval", {}, [many | {"name": f"acc ({index})"} for index in range(MOST)]))
    panels = overview(results)
    rows = [row for panel in panels for row in panel.rows]
    shown = [row for row in rows if row.verdict != "no difference shown"]
    assert len(shown) == sum(row.verdict != "no difference shown" for p in overview(committed()) for row in p.rows)
    others = [row for row in rows if row.verdict == "no difference shown"]
    # One in each panel that has any, and of those in percent all hold.
    assert [row.task for row in others] == ["Others"] * (len(panels) - 1)
    assert sum(int(row.name.split()[0]) for row in others) == MOST + 3
    # From end to end, and no point that nobody measured.
    points = next(panel for panel in panels if "points" in panel.title)
    assert points.rows[-1].value is None and points.rows[-1].low == pytest.approx(100 * 0.04 / 1.08, abs=0.1)


@pytest.mark.full
def test_a_model_alone_has_no_overview():
    assert overview(committed(models=1)) == []
    alone, both = page(1), page(2)
    assert both.count('<tr class="row') == 28 and both.count('class="forest"') == 3
    assert 'class="glance"' in both and 'class="overview"' in both
    assert '<tr class="row' not in alone and 'class="glance"' not in alone and 'class="overview"' not in alone
