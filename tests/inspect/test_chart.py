"""The picture of lines: its points stand where their numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fnrecipe.errors import UsageError
from fnrecipe.inspect.chart import Chart, Line, svg

SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)  # noqa: S314 - our own


def places(picture: str) -> list[list[tuple[float, float]]]:
    """The points of each line, in the picture."""
    lines = parsed(picture).iter(f"{SVG}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize("log_x", [False, True])
def test_points_keep_their_proportions(log_x: bool) -> None:
    xs, ys = [1.0, 10.0, 100.0, 1000.0], [2.0, 5.0, 3.0, 1.0]
    chart = Chart(lines=[Line("a", list(zip(xs, ys, strict=True)))], x="x", y="y", log_x=log_x)
    ((*found,),) = places(svg(chart))
    scaled = [math.log10(x) for x in xs] if log_x else xs
    for number, (x, y) in enumerate(found):
        share = (scaled[number] - scaled[0]) / (scaled[-1] - scaled[0])
        assert (x - found[0][0]) / (found[-1][0] - found[0][0]) == pytest.approx(share, abs=1e-3)
        assert (y - found[1][1]) / (found[3][1] - found[1][1]) == pytest.approx((5 - ys[number]) / 4, abs=1e-3)
    assert found[1][1] < found[3][1]  # what is greater is higher up


def test_powers_are_straight_on_logarithmic_axes() -> None:
    line = Line("a", [(x, 3 * x**0.5) for x in (32.0, 64.0, 256.0)] + [(512.0, 0.0), (-1.0, 2.0)])
    (((a, b), (c, d), (e, f)),) = places(svg(Chart(lines=[line], x="x", y="y", log_x=True, log_y=True)))
    assert (d - b) / (c - a) == pytest.approx((f - d) / (e - c), abs=0.02)
    assert (f - b) < 0 < (e - a)


def test_several_charts_stand_side_by_side() -> None:
    chart = Chart(lines=[Line("a", [(1.0, 2.0), (2.0, 3.0)])], x="x", y="y")
    root = parsed(svg(chart, chart, chart))
    assert root.attrib["viewBox"] == "0 0 1520 840"
    groups = [each.attrib["transform"] for each in root.findall(f"{SVG}g")]
    assert groups == ["translate(0 0)", "translate(760 0)", "translate(0 420)"]


def test_numbers_at_the_axes_stand_where_they_are() -> None:
    points = [(1e-4, 0.0), (1.0, 50.0), (math.inf, 1.0), (2.0, math.nan)]
    picture = svg(Chart(lines=[Line("a <b>", points)], x="x", y="y", log_x=True))
    ((first, last),) = places(picture)
    texts = {text.text: text.attrib for text in parsed(picture).iter(f"{SVG}text")}
    assert float(texts["0.0001"]["x"]) == first[0]
    assert float(texts["1"]["x"]) == last[0]
    assert float(texts["0.01"]["x"]) == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert float(texts["50"]["y"]) - float(texts["0"]["y"]) == pytest.approx(last[1] - first[1], abs=0.1)
    assert "a <b>" in texts


def test_a_mark_stands_at_its_value_and_a_single_point_has_a_place() -> None:
    picture = svg(Chart(lines=[Line("a", [(1.0, 3.0), (3.0, 3.0)])], x="x", y="y", marks={"here": 2.0}))
    ((first, last),) = places(picture)
    (mark,) = re.findall(r'<path d="M([\d.]+) [^>]*dasharray', picture)
    assert float(mark) == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert first[1] == last[1]


def test_a_picture_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a point that has a place, found none in loss"):
        svg(Chart(lines=[Line("a", [(1.0, math.nan)])], x="x", y="loss"))
