import json
from html.parser import HTMLParser

import pytest

from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import model_text
from everystep.views.report import report_html

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and the text directly in each kind of them."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.texts = {}
        self._open = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open and data.strip():
            self.texts.setdefault(self._open[-1], []).append(data)

    def count(self, tag):
        return sum(found == tag for found, _ in self.elements)

    @property
    def all_text(self):
        return "\n".join(text for tag, texts in self.texts.items() if tag != "style" for text in texts)


def test_says_what_the_run_is_in_the_order_of_the_chapter(trained):
    run = RecordedRun(trained)
    page = Page(report_html(run))
    labels = ["device", "data", "model", "loss", "update", "steps", "seed", "numerics", "versions"]
    # Each where it comes first: the numerics have a device of their own.
    assert list(dict.fromkeys(label for label in page.texts["dt"] if label in labels)) == labels
    assert page.texts["h1"] == ["run"]
    assert model_text(run.facts.training.modules) in page.all_text
    assert "50, each with all 64 rows" in page.all_text
    assert "finished" in page.all_text


def test_says_why_a_run_failed(changed):
    facts = [("status", '"failed"'), ("reason", '"at step 7 </dd><b>"'), ("nonfinite_step", "7")]
    run = changed(
        ("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts),
        ("UPDATE steps SET loss = ? WHERE step = ?", [(None, 7), (float("inf"), 9)]),
    )
    page = Page(report_html(run))
    assert "at step 7 </dd><b>" in page.all_text
    assert "not finite" in page.all_text or "is nan at step 7" in page.all_text
    assert page.count("b") == 0


def test_holds_every_loss_in_its_fewest_digits(trained):
    run = RecordedRun(trained)
    html = report_html(run)
    assert [text for text in map(str, run.losses["loss"].to_numpy()) if text not in html] == []


def test_holds_the_measurements(changed):
    rows = [("validation_loss", 0, 3.515625), ("accuracy", 10, 0.515625), ("lr", 1, 0.1)]
    html = report_html(changed(("INSERT INTO measurements VALUES (?, ?, ?)", rows)))
    for text in ("validation_loss", "accuracy", "3.515625", "0.515625"):
        assert text in html


@pytest.mark.parametrize("loss", [None, float("inf"), float("-inf"), 0.0, -1.0, 3e38, 1e-45])
def test_a_run_of_one_strange_loss_over_and_over(changed, loss):
    html = report_html(changed(("UPDATE steps SET loss = ?", [(loss,)])))
    assert Page(html).texts["h1"] == ["changed"]


def test_a_run_without_a_step(changed):
    none = ("UPDATE facts SET value = ? WHERE key = 'steps'", [("0",)])
    html = report_html(changed(("DELETE FROM steps WHERE step > ?", [(0,)]), none))
    assert "No steps." in Page(html).all_text


def test_no_name_is_markup(trained, changed):
    names = [HOSTILE, "</script><script>alert(1)</script>", "<!--<script>", "</style><b>", "'\"&amp;"]
    run = changed(
        ("INSERT INTO measurements VALUES (?, 5, 1.5)", [(name,) for name in names]),
        ("INSERT OR REPLACE INTO facts VALUES ('reason', ?)", [(json.dumps(name),) for name in names]),
        name=HOSTILE,
    )
    html = report_html(run)
    page, tame = Page(html), Page(report_html(RecordedRun(trained)))
    assert page.texts["h1"] == [HOSTILE]
    assert HOSTILE in page.texts["title"][0]
    for tag in ("img", "b", "script", "style"):
        assert page.count(tag) == tame.count(tag)
    assert "<!--<" not in html
    assert "alert(1)</script>" not in html


def test_what_is_embedded_as_json_is_json(changed):
    html = report_html(changed(("UPDATE steps SET loss = ? WHERE step = ?", [(None, 7), (9e999, 9)])))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    pieces = html.split('<script type="application/json"')[1:]
    assert pieces
    for piece in pieces:
        json.loads(piece.partition(">")[2].partition("</script>")[0], parse_constant=refuse)


def test_has_no_event_handlers_and_fetches_nothing(trained):
    html = report_html(RecordedRun(trained))
    for _, attributes in Page(html).elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "action"} & set(attributes):
            assert attributes[name].startswith("data:")
    assert "default-src 'none'" in html


def test_is_small(trained):
    assert len(report_html(RecordedRun(trained)).encode()) < 1_500_000


def test_a_long_run_is_an_excerpt_that_says_so_and_loses_no_spike(changed):
    rows = [(step, 98.76543 if step == 143_211 else 1 / step) for step in range(51, 200_001)]
    html = report_html(changed(("INSERT INTO steps VALUES (?, ?)", rows)))
    assert "98.76543" in html
    assert "excerpt" in html.lower()
    assert "200,000" in html
    assert len(html.encode()) < 5_000_000
