import json
import re

import numpy as np
import polars as pl
import pytest

from everystep.errors import UsageError
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import shortest
from everystep.views.loss_table import loss_table, shortest_texts


def embedded(html):
    """Return what a page gives to DataTables, as {title: column}."""
    (text,) = re.findall(r'<script type="application/json" class="rows">(.*?)</script>', html)
    data = json.loads(text)
    return dict(zip(data["titles"], data["columns"], strict=True))


def test_holds_every_loss_in_its_fewest_digits(trained):
    run = RecordedRun(trained)
    columns = embedded(loss_table(run).html())
    assert list(columns) == ["step", "loss"]
    assert columns["step"] == run.losses["step"].to_list()
    assert columns["loss"] == [shortest(loss) for loss in run.losses["loss"]]
    assert np.array_equal(np.float32(columns["loss"]), run.losses["loss"].to_numpy())


def test_nan_and_infinities_are_written_out(run_of):
    columns = embedded(loss_table(run_of([1.5e-05, None, float("inf"), 628.28394])).html())
    assert columns["loss"] == ["1.5e-05", "nan", "inf", shortest(float(np.float32(628.28394)))]


def test_a_measurement_is_a_column_blank_where_there_is_none(run_of):
    measured = [("accuracy", 0, 0.25), ("accuracy", 2, None), ("loss", 1, 0.1), ("step", 3, 7.0)]
    table = loss_table(run_of([3.0, 2.0, 1.0], measured))
    columns = embedded(table.html())
    assert columns == {
        "step": [0, 1, 2, 3],
        "loss": ["", "3.0", "2.0", "1.0"],
        "accuracy": ["0.25", "", "nan", ""],
        "loss (measured)": ["", "0.1", "", ""],
        "step (measured)": ["", "", "", "7.0"],
    }
    assert table.frame["accuracy"].null_count() == 2


def test_a_long_run_is_an_excerpt_that_says_so_and_loses_no_spike(run_of):
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
    caption = table.caption()
    (of_each,) = re.findall(r"of each ([\d,]+) steps the smallest and the largest loss", caption)
    width = int(of_each.replace(",", ""))
    kept = dict(zip(table.frame["step"], table.frame.drop("step").rows(), strict=True))
    for i, column in enumerate(values):
        for start in range(0, 4321, width):
            stretch = column[start : start + width]
            found = [kept[n][i] for n in range(start + 1, start + len(stretch) + 1) if n in kept]
            assert (min(found), max(found)) == (stretch.min(), stretch.max())


def test_a_table_of_all_rows_says_nothing_of_an_excerpt(trained):
    assert "excerpt" not in loss_table(RecordedRun(trained)).html().lower()


def test_too_short_a_table_is_refused(trained):
    with pytest.raises(UsageError, match="at least 100"):
        loss_table(RecordedRun(trained), rows=99)


def test_without_scripts_the_first_rows_can_be_read(run_of):
    html = loss_table(run_of([0.5 + step for step in range(20)])).html()
    cells = re.findall("<td>(.*?)</td>", html)
    assert cells == [text for step in range(10) for text in (str(step + 1), str(0.5 + step))]
    assert "The first 10 of 20 rows" in html


def test_a_run_without_a_step_has_an_empty_table(run_of):
    table = loss_table(run_of([]))
    assert embedded(table.html()) == {"step": [], "loss": []}
    assert table.frame.is_empty()


def test_no_name_is_markup(run_of):
    hostile = "</script><img src=x onerror=alert(1)>"
    run = run_of([1.0], [(hostile, 1, 2.0)], name="<img src=x onerror=alert(1)> & <!--")
    table = loss_table(run)
    for html in (table.html(), table._repr_html_()):
        assert "<img" not in html
        assert "<!--" not in html
        assert list(embedded(html))[-1] == hostile
    assert "<title>&lt;img src=x onerror=alert(1)&gt; &amp; &lt;!--: losses</title>" in table.html()


def test_a_page_is_complete_and_fetches_nothing(trained, tmp_path):
    table = loss_table(RecordedRun(trained))
    table.save(tmp_path / "losses.html")
    html = (tmp_path / "losses.html").read_text(encoding="utf-8")
    assert html == table.html()
    assert html.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in html
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"\s(src|on\w+)\s*=", re.sub("<script.*?</script>", "", html, flags=re.DOTALL))
    assert len(html) < 1_000_000


def test_a_notebook_gets_the_table_without_the_page_around_it(trained):
    table = loss_table(RecordedRun(trained))
    html = table._repr_html_()
    assert html in table.html()
    assert html.startswith('<div class="everystep-table">')
    assert "<body" not in html


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
