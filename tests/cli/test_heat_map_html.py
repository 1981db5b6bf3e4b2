"""The conflict page: its numbers are the report's, it loads nothing, and no name can break out of its text."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

from mediator_cli.bundle.digest import digest_tensors, file_digest
from mediator_cli.checkpoint.header import read_header
from mediator_cli.cli.heat import style as heat_style
from mediator_cli.cli.heat.chart import axis
from mediator_cli.cli.heat.style import STEPS, contrast, ink_on, ramp

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert(1)<"


@dataclass
class Element:
    """One element of a page: its name, attributes and the text inside it."""

    name: str
    attributes: dict[str, str | None]
    text: str = ""
    inside: tuple[str, ...] = ()


@dataclass
class Page(HTMLParser):
    """A page, parsed; raises where an end tag does not fit."""

    text: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.open: list[Element] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), inside=tuple(e.name for e in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), inside=tuple(e.name for e in self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag, /, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [e for e in self.elements if e.name == tag and wanted.items() <= e.attributes.items()]

    def marks(self, what):
        return [e for e in self.all("g", class_=f"point {what}")]


@pytest.fixture
def drawn(mediator, workshop):
    """Measure, draw, and give page, text and report."""

    def run(*words, **recipe):
        path = workshop.recipe(**recipe)
        done = mediator("analyze-conflicts", path.name, "-o", "c.json", "--plot", "heat.html", "--json", *words)
        assert done.code == 0, done.err
        text = (workshop.folder / "heat.html").read_text()
        return Page(text), text, json.loads(done.out)

    return run


MEAN = {"assign": {"rule": "mean_std", "std": 0.5}}


def rows_of(page):
    """Give the heat map's rows: label, texts of the cells, score, assignment."""
    first, second = (n for n, e in enumerate(page.elements) if e.name == "tbody")
    found, row = [], []
    for element in page.elements[first:second]:
        if "thead" in element.inside or element.name == "table":
            break
        if element.name == "tr":
            row = []
            found.append(row)
        elif element.name in ("th", "td"):
            row.append(element)
    return found


def test_the_scores_are_those_of_the_report(drawn):
    page, _, report = drawn(**MEAN)
    rows = {row[0].attributes["title"]: row for row in rows_of(page)}
    assert set(rows) == set(report["units"])
    for unit, scores in report["units"].items():
        assert rows[unit][-2].text == f"{100 * scores['sign']:.1f}"
    assert [row[0].text for row in rows_of(page)] == ["0", "1", "2", "embed_tokens", "norm"]


def test_a_cell_tells_the_conflict_of_its_module(drawn):
    page, _, report = drawn(**MEAN)
    heads = [e.text for e in page.all("th", scope="col")][1:]
    record = report["tensors"]["model.layers.1.mlp.up_proj.weight"]
    opposite, both = record["opposite"][0][1], record["both"][0][1]
    cell = rows_of(page)[1][1 + heads.index("up")]
    assert cell.text == f"{100 * opposite / both:.0f}"
    assert cell.attributes["data-tip"] == f"1 up_proj: {100 * opposite / both:.2f} %"


def test_marks_and_words_agree_on_the_assignment(drawn, mediator):
    page, text, report = drawn(**MEAN)
    scores = [report["units"][f"model.layers.{n}"]["sign"] for n in range(3)]
    mean = sum(scores) / 3
    limit = mean + 0.5 * (sum((score - mean) ** 2 for score in scores) / 3) ** 0.5
    routed = [n for n, score in enumerate(scores) if score > limit]
    assert 0 < len(routed) < 3
    assert [row[-1].text.split()[-1] for row in rows_of(page)][:3] == [
        "route" if n in routed else "average" for n in range(3)
    ]
    assert len(page.marks("route")) == len(routed)
    assert len(page.marks("average")) == 3 - len(routed)
    assert all(f"model.layers.{n}: {100 * scores[n]:.2f} %, route" in text for n in routed)
    assert f"{100 * limit:.1f} %</text>" in text
    assert "rule mean_std, std 0.5" in text
    assert len(page.all("line", class_="limit")) == 2


def test_shapes_differ_not_only_colours(drawn):
    page, _, _ = drawn(**MEAN)
    assert all("mark" in [e.attributes.get("class") for e in page.all(name)] for name in ("circle", "rect"))
    assert {row[-1].text[0] for row in rows_of(page)} == {"●", "○"}


def test_a_rule_without_a_limit_draws_none(drawn):
    page, text, _ = drawn(assign={"rule": "top_k", "k": 1})
    assert page.all("line", class_="limit") == []
    assert len(page.marks("route")) == 1
    assert "rule top_k, k 1" in text


def test_what_counts_as_a_change_is_told(drawn):
    assert "Small changes are left out: keep_above_std 1.0." in drawn(**MEAN)[1]
    text = drawn(conflict={"denoise": "none"}, assign={"rule": "listed", "units": ["*.1", "*.2"]})[1]
    assert "All changes count." in text
    assert "rule listed, 2 units" in text


def test_smaller_units_are_all_drawn(drawn):
    page, text, _ = drawn(conflict={"unit": "block"}, assign={"rule": "top_k", "k": 2})
    assert len(page.marks("route")) == 2
    assert len(page.marks("route")) + len(page.marks("average")) == 3 * 4
    assert "of 4 units" in text
    assert page.all("polyline") == []


def test_the_page_loads_nothing_and_runs_nothing(drawn):
    page, text, _ = drawn(**MEAN)
    names = {element.name for element in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not any(key.startswith("on") for e in page.elements for key in e.attributes)
    assert not any(e.attributes.keys() & {"src", "href", "xlink:href", "style"} for e in page.elements)
    assert all(word not in text for word in ("http:", "https:", "@import", "url("))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_the_page_is_told_to_readers_of_screens_and_phones(drawn):
    page, text, _ = drawn(**MEAN)
    (root,) = page.all("html")
    assert root.attributes["lang"] == "en"
    (picture,) = page.all("svg", role="img")
    assert picture.attributes["aria-label"].startswith("Scores: 3 units, ")
    assert page.all("caption")[0].text.startswith("Conflict in per cent")
    assert {e.attributes.get("scope") for e in page.all("th")} == {"row", "col"}
    assert page.all("meta", name="viewport")
    assert "prefers-color-scheme:dark" in text
    assert all(e.attributes.get("tabindex") == "0" for e in page.all("div", role="region"))


def test_no_name_breaks_out_of_its_text(drawn, workshop):
    shutil.copytree(workshop.folder / "b", workshop.folder / HOSTILE / "script>'\"&")
    experts = [{"name": "a", "model": "./a"}, {"name": "b", "model": f"./{HOSTILE}/script>'\"&"}]
    page, text, _ = drawn(experts=experts, **MEAN)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#x27;&quot;&amp;" in text
    cells = [e.text for e in page.all("td")]
    assert f"./{HOSTILE}/script>'\"&" in cells


def test_what_was_measured_is_told_by_its_digests(drawn, workshop):
    page, _, report = drawn(**MEAN)
    assert [e.text for e in page.all("th") if e.text.endswith(" begins")] == ["digest begins"]
    shown = [e.text for e in page.all("code") if "tbody" in e.inside]
    digests = {}
    for name, (file,) in report["sources"].items():
        tensors = read_header(workshop.folder / name / file["name"]).tensors
        expected = file_digest(workshop.folder / name / file["name"], digest_tensors({t.name: t for t in tensors}))
        assert (file["xxh3"], file["sha256"]) == (expected, None)
        digests[name] = expected[:12]
    assert list(digests) == ["base", "a", "b"]
    assert shown == list(digests.values())


def test_changes_of_the_command_line_stand_behind_the_recipe(drawn):
    page, _, _ = drawn("--set", "assign.rule=top_k", "--set", "assign.k=0", **MEAN)
    (recipe,) = page.all("pre")
    assert recipe.text.endswith("--set assign.rule=top_k\n--set assign.k=0")
    assert "mean_std" in recipe.text


def test_the_same_report_draws_the_same_page(drawn):
    assert drawn(**MEAN)[1] == drawn("--workers", "1", **MEAN)[1]


def test_a_page_needs_no_matplotlib(drawn, workshop, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert drawn(**MEAN)[1].startswith("<!doctype html>")
    words = ("analyze-conflicts", "recipe.yaml", "--plot", "heat.png")
    refused("--plot", "pictures need matplotlib", "or give a name that ends with .html", *words)


def test_a_picture_for_print_is_a_pdf(workshop, mediator):
    workshop.recipe()
    assert mediator("analyze-conflicts", "recipe.yaml", "--plot", "heat.pdf").code == 0
    assert (workshop.folder / "heat.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("anchors", [heat_style._LIGHT, heat_style._DARK])
def test_numbers_can_be_read_on_every_shade(anchors):
    shades = ramp(anchors)
    assert len(set(shades)) == STEPS
    assert min(contrast(ink_on(shade), shade) for shade in shades) >= 4.5


@pytest.mark.parametrize("colours", [heat_style._LIGHT_COLOURS, heat_style._DARK_COLOURS])
def test_text_can_be_read_on_page_and_card(colours):
    known = dict(part.removeprefix("--").split(":") for part in colours.split(";"))
    words = [known[name] for name in ("ink", "soft", "route", "average")]
    assert min(contrast(word, known[ground]) for word in words for ground in ("page", "card")) >= 4.5


@pytest.mark.parametrize(
    ("scores", "limit", "ends"),
    [
        ([0.31, 0.42], 0.35, (0.3, 0.45)),
        ([0.2, 0.2], None, (0.2, 0.21)),
        ([], None, (0.0, 0.01)),
        ([0.0, 1.0], 0.5, (0.0, 1.0)),
    ],
)
def test_the_axis_holds_all_scores_and_the_limit(scores, limit, ends):
    low, high, ticks = axis(scores, limit)
    assert (low, high) == ends
    assert ticks[0] == low < ticks[-1] == high
    assert all(low <= value <= high for value in (*scores, *([limit] if limit else [])))
