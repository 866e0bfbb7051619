"""The page of a comparison and its drawings, on made-up results."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.workflows.studies import METHODS, PAIRS, RELATIONS, example_comparison
from workflows.comparison_page import relations_of, write_comparison
from workflows.comparison_plots import (
    curves_plot,
    line_style,
    pairs_plot,
    places_of,
    relations_plot,
    spread,
)
from workflows.metrics import METRIC

SCORE = METRIC["score"]
PLACES = places_of([{"method": name} for name in METHODS])


def test_lines_can_be_told_apart() -> None:
    assert len({line_style(place)[:2] for place in range(15)}) == 15
    names = ["base", *"abcdefgh"]
    rows = [
        {"method": name, "edits": edits, "metrics": {"score": 50.0}, "intervals": {}}
        for name in names
        for edits in (1, 10)
    ]
    drawn = curves_plot(rows, "score")
    places = re.findall(r'y="([\d.]+)"[^>]*>(base|[a-h])</text>', drawn)
    assert sorted(name for _, name in places) == sorted(names)
    heights = sorted(float(y) for y, _ in places)
    assert all(b - a > 10 for a, b in pairwise(heights))  # as high as their letters


def test_labels_keep_their_distance_and_order() -> None:
    heights = [50.0, 51.0, 90.0, 49.5, 0.0, 50.0]
    found = spread(heights, 12.0)
    assert found[2] == 90 and found[4] == 0
    order = sorted(range(6), key=lambda i: heights[i])
    assert order == sorted(range(6), key=lambda i: found[i])
    ascending = sorted(found)
    assert all(b - a >= 12 - 1e-9 for a, b in pairwise(ascending))
    near = [found[i] for i in (0, 1, 3, 5)]
    assert sum(near) / 4 == pytest.approx(sum(heights[i] for i in (0, 1, 3, 5)) / 4)


def test_a_curve_of_what_was_not_measured_is_not_drawn() -> None:
    assert (
        curves_plot([{"method": "memit", "edits": 1, "metrics": None, "intervals": {}}], "score")
        == ""
    )


def test_a_method_keeps_its_colour_where_others_fail() -> None:
    places = places_of([{"method": name} for name in ("memit", "base", "rome")])
    assert list(places.items()) == [("base", 0), ("memit", 1), ("rome", 2)]
    rows = [
        {"method": name, "edits": 1, "metrics": metrics, "intervals": {}}
        for name, metrics in (("base", None), ("memit", None), ("rome", {"score": 50.0}))
    ]
    assert set(re.findall(r"var\(--series-\d\)", curves_plot(rows, "score"))) == {colour("memedit")}


# By relation --------------------------------------------------------------------------------------


def test_each_relation_has_a_dot_of_each_method_with_its_interval() -> None:
    rows, names = judged(example_comparison(relations=RELATIONS[:3], failing=()))
    drawn = relations_plot(rows, names, SCORE, PLACES)
    percent = axis(drawn)
    found = dots(drawn)
    assert len(found) == 3 * len(rows)
    for row in rows:
        mine = [(x, y) for fill, x, y in found if fill == colour(row["method"])]
        values = [each["metrics"]["score"] for each in row["relations"]]
        assert [percent(x) for x, _ in mine] == pytest.approx(values, abs=0.01)
        assert all(below > above for (_, above), (_, below) in pairwise(mine))
        ends = [[percent(x) for x, _ in line] for line in lines(drawn, colour(row["method"]))]
        assert ends == [pytest.approx(r["intervals"]["score"], abs=0.01) for r in row["relations"]]
    heights = [y for _, _, y in found]
    assert len(set(heights)) == len(heights), "no two lie on each other"


def test_names_of_relations_are_texts_in_two_lines_at_most() -> None:
    rows, names = judged(example_comparison())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that matplotlib's font lacks
        drawn = relations_plot(rows, names, SCORE, PLACES)
    said = texts(drawn)
    assert {"{} plays the", "{}, who holds a", "P17", *METHODS} - set(said) == {"alphaedit"}
    assert "cost? It costs $5 & not…" in said and "What does <b>{}</b>" in said
    assert [len(text) for text in said if max(text) > "\u3000"] == [12, 12]
    assert max(map(len, said)) <= 24


def test_a_drawing_is_always_the_same_and_takes_the_pages_colours() -> None:
    result = example_comparison()
    rows, names = judged(result)
    for draw in (
        lambda: relations_plot(rows, names, SCORE, PLACES),
        lambda: pairs_plot(result["pairs"], SCORE, PLACES),
    ):
        drawn = draw()
        assert drawn == draw()
        assert not re.findall(r"#[0-9a-f]{6}\b", drawn), "a colour that dark mode cannot change"
        assert re.search(r'role="img" aria-label="Score of [^"<&]+"', drawn)
    said = relations_plot(rows, names, SCORE, PLACES).partition(">")[0]
    assert re.search(r"8 relations with 95% intervals: base \d+\.\d to \d+\.\d; memit ", said)


def test_what_was_not_measured_of_a_relation_has_no_dot() -> None:
    rows = [
        {"method": "base", "relations": [{"metrics": {}, "intervals": {}}] * 2},
        {
            "method": "memit",
            "relations": [
                {"metrics": {"score": value}, "intervals": {}} for value in (math.nan, 62.5)
            ],
        },
    ]
    drawn = relations_plot(rows, ["a", "b"], SCORE, PLACES)
    ((fill, x, _),) = dots(drawn)
    assert fill == colour("memit") and axis(drawn)(x) == pytest.approx(62.5, abs=0.01)
    assert not lines(drawn, colour("memit")) and "base" not in texts(drawn)
    assert relations_plot(rows[:1], ["a", "b"], SCORE, PLACES) == ""


# By pair ------------------------------------------------------------------------------------------


def test_each_pair_has_a_ring_apart_and_a_dot_together() -> None:
    pairs = example_comparison()["pairs"]
    drawn = pairs_plot(pairs, SCORE, PLACES)
    percent = axis(drawn)
    found = dots(drawn)
    good = [row for row in pairs if not row["failed"]]
    assert len(good) == 9 and len(found) == 18
    for row, ring, dot in zip(good, found[:9], found[9:], strict=True):
        assert (ring[0], dot[0]) == ("var(--paper)", colour(row["method"]))
        assert percent(ring[1]) == pytest.approx(row["apart"]["score"], abs=0.01)
        assert percent(dot[1]) == pytest.approx(row["together"]["score"], abs=0.01)
        assert ring[2] == dot[2]
    low, high = pairs[0]["changes"]["score"]
    of_memit = [[percent(x) for x, _ in line] for line in lines(drawn, colour("memit"))]
    apart, together = (pairs[0][side]["score"] for side in ("apart", "together"))
    assert of_memit[::2] == [  # changes lie over the lines of all pairs
        pytest.approx([apart, together], abs=0.01),
        pytest.approx([apart + low, apart + high], abs=0.01),
    ]
    said = texts(drawn)
    assert [text for text in said if text in METHODS] == [row["method"] for row in good]
    assert " + ".join(PAIRS[0]) in said


def test_pairs_that_failed_or_say_little() -> None:
    pairs = example_comparison(failing=METHODS, pairs=PAIRS[:1])["pairs"]
    assert pairs_plot(pairs, SCORE, PLACES) == ""
    same = {"method": "memit", "relations": ["a", "b"], "changes": {}, "failed": None}
    same |= {side: {"score": 71.0} for side in ("apart", "together")}
    drawn = pairs_plot([same], SCORE, PLACES)
    assert len(dots(drawn)) == 2
    shown = [float(text.removesuffix("%")) for text in texts(drawn) if text.endswith("%")]
    assert max(shown) - min(shown) >= 5, "an axis on which nothing looks like much"


# The page -----------------------------------------------------------------------------------------


def page_of(result: dict[str, Any], folder: Path) -> str:
    write_comparison(result, folder / "page.html")
    return (folder / "page.html").read_text()


def test_the_most_facts_are_drawn_by_relation(tmp_path: Path) -> None:
    page = page_of(example_comparison(), tmp_path)
    assert page.count("<svg") == 4 + 2 and page.count("Score by relation</h3>") == 2
    assert page.index("100 facts</h2>") < page.index('aria-label="Score of 8 relations')
    assert page.count("&lt;b&gt;{}&lt;/b&gt;") > 2 and "<b>{}" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert '<th scope="rowgroup" rowspan="5">' in page
    assert page.count("no null space") == 2  # with the most facts, and on the last pair


@pytest.mark.parametrize(
    ("made", "drawings"),
    [
        ({"methods": ["memit"], "failing": ()}, 6),
        ({"edits": [3], "pairs": ()}, 5),
        ({"edits": [1]}, 4 + 1),  # the pairs, and no relations
        ({"relations": RELATIONS[:1]}, 5),
        ({"failing": METHODS, "edits": [3], "pairs": PAIRS[:1]}, 3 + 1),  # the base by relation
        ({"methods": [], "failing": (), "edits": [1]}, 3),
    ],
)
def test_little_to_show(tmp_path: Path, made: dict[str, Any], drawings: int) -> None:
    page = page_of(example_comparison(**made), tmp_path)
    assert page.count("<svg") == drawings
    assert page.rstrip().endswith("</html>")


def test_facts_without_an_old_object_are_drawn_by_what_they_have(tmp_path: Path) -> None:
    """`score` compares with `target_true`."""
    result = example_comparison(edits=[20], failing=())
    for row in result["rows"]:
        for found in (row, *row["relations"]):
            del found["metrics"]["score"], found["intervals"]["score"]
        row["metrics"]["score"] = None
    for row in result["pairs"]:
        del row["together"]["score"], row["apart"]["score"], row["changes"]["score"]
    page = page_of(result, tmp_path)
    assert "Efficacy, exact by relation" in page and "Efficacy, exact of 2 pairs" in page
    assert page.count("<svg") == 3 + 2


# What a drawing shows -----------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def judged(result: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the most facts that were judged, and the names of their relations."""
    most = max(row["edits"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["edits"] == most and row["metrics"]]
    found = relations_of(rows)
    assert found is not None and found["plot"] == ""
    return rows, [line["name"] for line in found["lines"]]


def colour(method: str) -> str:
    """As a drawing has it."""
    return f"var(--series-{PLACES[method] - 1})" if PLACES[method] else "var(--muted)"


def dots(drawn: str) -> list[tuple[str, float, float]]:
    """The colour and place of each mark on the axes, in the order in which they were drawn."""
    found = []
    for mark in ElementTree.fromstring(drawn).iter(f"{SVG}g"):
        if mark.find(f"{SVG}path") is None:  # the strokes at the ends of a line are no dots
            for use in mark.findall(f"{SVG}g[@clip-path]/{SVG}use"):
                found.append((style(use)["fill"], float(use.attrib["x"]), float(use.attrib["y"])))
    return found


def lines(drawn: str, stroke: str) -> list[list[tuple[float, float]]]:
    """The ends of each straight line of a colour."""
    paths = [p for p in ElementTree.fromstring(drawn).iter(f"{SVG}path") if p.get("clip-path")]
    return [
        [
            tuple(map(float, end.split()))
            for end in re.findall(r"[ML] ([\d.]+ [\d.]+)", p.attrib["d"])
        ]
        for p in paths
        if style(p).get("stroke") == stroke
    ]


def texts(drawn: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def style(element: ElementTree.Element) -> dict[str, str]:
    parts = (part.split(":") for part in element.attrib["style"].split(";"))
    return {name.strip(): value.strip() for name, value in parts}


def axis(drawn: str) -> Callable[[float], float]:
    """What a place along the lower axis stands for, by its first and last label."""
    labels = {
        float(text.attrib["x"]): float(said.removesuffix("%"))
        for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")
        if re.fullmatch(r"[\d.]+%?", said := "".join(text.itertext()))
    }
    (left, low), *_, (right, high) = sorted(labels.items())
    return lambda x: low + (x - left) / (right - left) * (high - low)
