"""A run as HTML: the table of its losses, its report, and its summary in a notebook."""

import json
import pickle
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

import everystep
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import model_text, optimizers_text, shortest
from everystep.views.loss_table import loss_table, shortest_texts
from everystep.views.report import report_html, summary_html

PAGES = {"table": lambda run: loss_table(run).html(), "report": report_html, "summary": summary_html}
HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = [HOSTILE, "</script><script>alert(1)</script>", "<!--<script>", "</style><b>", "'\"&amp;"]
NAN, INF = None, float("inf")  # NULL in a run's database means NaN


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

    @property
    def tags(self):
        return sorted(tag for tag, _ in self.elements if tag in ("img", "b", "script", "style"))

    @property
    def all_text(self):
        return "\n".join(text for tag, texts in self.texts.items() if tag != "style" for text in texts)


def embedded(html):
    """Return what a page gives to DataTables, as {title: column}."""
    (text,) = re.findall(r'<script type="application/json" class="(?:rows|losses)">(.*?)</script>', html)
    data = json.loads(text)
    return dict(zip(data["titles"], data["columns"], strict=True))


def picture(html):
    """Return the part of a summary that draws."""
    found = re.search("<svg.*?</svg>", html, re.DOTALL)
    return found[0] if found else None


@pytest.fixture(params=PAGES)
def page_of(request):
    return PAGES[request.param]


def test_no_name_is_markup(trained, changed, page_of):
    run = changed(
        ("INSERT INTO measurements VALUES (?, 5, 1.5)", [(name,) for name in NAMES]),
        ("INSERT OR REPLACE INTO facts VALUES ('reason', ?)", [(json.dumps(name),) for name in NAMES]),
        name=HOSTILE,
    )
    html = page_of(run)
    assert HOSTILE in Page(html).all_text
    assert Page(html).tags == Page(page_of(RecordedRun(trained))).tags
    assert "<!--<" not in html and "alert(1)</script>" not in html


def test_has_no_event_handlers_and_fetches_nothing(trained, page_of):
    html = page_of(RecordedRun(trained))
    for _, attributes in Page(html).elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "srcset", "action"} & set(attributes):
            assert attributes[name].startswith("data:")
    assert "default-src 'none'" in html or "<script" not in html


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses", [[], [NAN, NAN], [5.0] * 3, [3.0, NAN, 2.0, INF, 1.0, -INF], [3e38, -3e38], [1e-45, 1e38]]
)
def test_shows_strange_losses_and_none_at_all(run_of, page_of, losses):
    html = page_of(run_of(losses))
    if page_of is report_html and not losses:
        assert "No steps." in Page(html).all_text
    elif page_of is not summary_html:
        shown = [shortest(np.nan if loss is None else float(np.float32(loss))) for loss in losses]
        assert embedded(html) == {"step": [*range(1, len(losses) + 1)], "loss": shown}
    numbers = re.findall(r'\b(?:d|points|cx|cy|x|y)="([^"]*)"', picture(html) or "")
    assert not re.search("nan|inf", " ".join(numbers))
    assert losses or picture(html) is None


def test_is_small_also_of_a_long_run(trained, changed):
    rows = [(step, 98.76543 if step == 143_211 else 1 / step) for step in range(51, 200_001)]
    run = changed(("INSERT INTO steps VALUES (?, ?)", rows))
    for page_of in PAGES.values():
        assert len(page_of(RecordedRun(trained)).encode()) < 1_500_000
        html = page_of(run)
        assert len(html.encode()) < (30_000 if page_of is summary_html else 5_000_000)
        if page_of is not summary_html:
            assert "98.76543" in html and "excerpt" in html.lower() and "200,000" in html


def test_what_is_embedded_as_json_is_json(run_of, page_of):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    pieces = page_of(run_of([1.0, NAN, INF])).split('<script type="application/json"')[1:]
    assert pieces or page_of is summary_html
    for piece in pieces:
        json.loads(piece.partition(">")[2].partition("</script>")[0], parse_constant=refuse)


def test_a_measurement_is_a_column_blank_where_there_is_none(run_of):
    measured = [("accuracy", 1, 0.25), ("accuracy", 2, None), ("loss", 1, 0.1), ("step", 3, 7.0)]
    run = run_of([3.0, 2.0, 1.0], measured)
    assert embedded(loss_table(run).html()) == embedded(report_html(run)) == {
        "step": [1, 2, 3],
        "loss": ["3.0", "2.0", "1.0"],
        "accuracy": ["0.25", "nan", ""],
        "loss (measured)": ["0.1", "", ""],
        "step (measured)": ["", "", "7.0"],
    }  # fmt: skip
    assert loss_table(run).frame["accuracy"].null_count() == 1


def test_a_long_table_is_an_excerpt_that_says_so_and_loses_no_spike(run_of):
    losses = [1 / step for step in range(1, 5001)]
    losses[1233] = 98.75
    losses[4321] = None
    measured = [("lr", step, -9.5 if step == 2347 else 1e-3) for step in range(1, 5001)]
    table = loss_table(run_of(losses, measured, name="a run"), rows=1000)
    kept = dict(table.frame.select("step", "loss").iter_rows())
    assert len(kept) <= 1000
    assert {1, 5000, 1234, 4322, 2347} <= set(kept)
    assert {step for step in range(1, 5001) if step % 50 == 0} <= set(kept)
    for text in (table.html(), repr(table)):
        assert f"{len(kept):,} of 5,000 rows" in text
        assert "every 50th step" in text
    assert "everystep losses &#39;a run&#39; --csv" in table.html()
    assert "everystep losses 'a run' --csv" in repr(table)


@pytest.mark.parametrize(("count", "rows"), [(1, 200), (4, 200), (4, 1000)])
def test_an_excerpt_has_the_extremes_that_its_caption_says(run_of, count, rows):
    values = np.random.default_rng(0).normal(size=(count + 1, 4321)).astype(np.float32)
    measured = [
        (f"m{i}", step, float(value))
        for i, column in enumerate(values[1:])
        for step, value in enumerate(column, 1)
    ]
    table = loss_table(run_of(values[0].tolist(), measured), rows=rows)
    assert len(table.frame) <= rows
    (found,) = re.findall(r"of each ([\d,]+) steps the smallest and the largest loss", table.caption())
    width = int(found.replace(",", ""))
    kept = dict(zip(table.frame["step"], table.frame.drop("step").rows(), strict=True))
    for i, column in enumerate(values):
        for start in range(0, 4321, width):
            stretch = column[start : start + width]
            found = [kept[n][i] for n in range(start + 1, start + len(stretch) + 1) if n in kept]
            assert (min(found), max(found)) == (stretch.min(), stretch.max())


def test_a_table_of_all_rows_says_nothing_of_an_excerpt(trained):
    assert "excerpt" not in loss_table(RecordedRun(trained)).html().lower()


def test_without_scripts_the_first_rows_of_a_table_can_be_read(run_of):
    html = loss_table(run_of([0.5 + step for step in range(20)])).html()
    cells = re.findall("<td>(.*?)</td>", html)
    assert cells == [text for step in range(10) for text in (str(step + 1), str(0.5 + step))]
    assert "The first 10 of 20 rows" in html


def test_a_table_is_saved_whole_and_a_notebook_gets_it_without_the_page_around_it(trained, tmp_path):
    table = loss_table(RecordedRun(trained))
    table.save(tmp_path / "losses.html")
    html = (tmp_path / "losses.html").read_text(encoding="utf-8")
    assert html == table.html() and html.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in html and "prefers-color-scheme: dark" in html
    part = table._repr_html_()
    assert part in html and part.startswith('<div class="everystep-table">') and "<body" not in part


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
def test_the_fewest_digits_give_the_number_back(dtype):
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=1000) * 10.0 ** generator.uniform(-40, 37, size=1000)
    numbers = np.concatenate([numbers, [0.0, -0.0, 1e-45, 1e38, 0.1, np.float32(0.1), np.inf, np.nan]])
    series = pl.Series(numbers, dtype=dtype)
    texts = shortest_texts(series)
    assert texts == [shortest(number) for number in series]
    if dtype == pl.Float32:
        assert np.array_equal(np.float32(texts), series.to_numpy(), equal_nan=True)


def test_a_report_says_what_the_run_is_in_the_order_of_the_chapter(trained):
    run = RecordedRun(trained)
    page = Page(report_html(run))
    labels = ["device", "data", "model", "loss", "update", "steps", "seed", "numerics", "versions"]
    # Each where it comes first: the numerics have a device of their own.
    assert list(dict.fromkeys(label for label in page.texts["dt"] if label in labels)) == labels
    assert page.texts["h1"] == ["run"]
    assert model_text(run.facts.training.modules) in page.all_text
    assert "50, each with all 64 rows" in page.all_text and "finished" in page.all_text


def test_a_report_can_be_pickled(trained):
    report = everystep.open(trained).report()
    copy = pickle.loads(pickle.dumps(report))
    assert copy == report and repr(copy) == repr(report)


def test_a_report_says_why_a_run_failed(changed):
    facts = [("status", '"failed"'), ("reason", '"at step 7 </dd><b>"'), ("nonfinite_step", "7")]
    run = changed(
        ("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts),
        ("UPDATE steps SET loss = ? WHERE step = ?", [(None, 7), (float("inf"), 9)]),
    )
    page = Page(report_html(run))
    assert "at step 7 </dd><b>" in page.all_text and "b" not in page.tags
    assert "not finite" in page.all_text or "is nan at step 7" in page.all_text


def test_a_summary_tells_the_run_in_a_few_lines(trained):
    run = RecordedRun(trained)
    html = summary_html(run)
    text = "".join(ElementTree.fromstring(html).itertext())
    update = optimizers_text(run.facts.training.optimizers)
    for shown in ("run", "finished", "MSELoss(reduction='sum')", update, "50"):
        assert shown in text
    assert len(html) < 10_000


def test_the_axis_of_a_small_picture_is_logarithmic_over_decades(run_of):
    assert "log" in picture(summary_html(run_of([100.0, 10.0, 1.0], name="decades")))
    assert "log" not in picture(summary_html(run_of([99.0, 10.0, 1.0], name="less")))
    assert "log" not in picture(summary_html(run_of([100.0, 10.0, -1.0], name="negative")))


def test_its_line_breaks_where_the_loss_is_not_finite(run_of):
    whole = picture(summary_html(run_of([3.0, 2.0, 1.5, 1.0], name="whole")))
    broken = picture(summary_html(run_of([3.0, 2.0, NAN, 1.5, 1.0], name="broken")))
    assert whole.count("M") + whole.count("<polyline") < broken.count("M") + broken.count("<polyline")
