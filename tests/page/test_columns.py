"""Curves and the table, against the same computed by polars from the numbers as they were written."""

import math
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.page.serving import Application, written
from tests.page.test_app import FACTS
from tests.sealing import sql

import everystep
from everystep.recording.database import Database

any_float32 = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0])
few = st.sampled_from([0.1, -0.1, 1.0, 1.5, 2.0, math.nan, math.inf, -math.inf]).map(
    lambda value: float(np.float32(value))
)
losses_of_a_run = st.lists(any_float32 | few, min_size=1, max_size=40)


@st.composite
def runs(draw):
    losses = draw(losses_of_a_run)
    steps = draw(st.sets(st.integers(0, len(losses)), max_size=10))
    return losses, [("m", step, draw(few)) for step in sorted(steps)]


def expected(losses, measurements, sort, direction, first, last, low, high):
    values = {step: value for _, step, value in measurements}
    steps = list(range(1, len(losses) + 1))
    frame = pl.DataFrame(
        {"step": steps, "loss": losses, "m": [values.get(step) for step in steps]},
        schema={"step": pl.Int64, "loss": pl.Float32, "m": pl.Float64},
        strict=False,
    )
    frame = frame.filter(pl.col("step").is_between(first or 0, last or len(losses)))
    if low is not None:
        frame = frame.filter((pl.col("loss") >= np.float32(low)) & pl.col("loss").is_not_nan())
    if high is not None:
        frame = frame.filter(pl.col("loss") <= np.float32(high))
    return frame.sort(sort, descending=direction == "desc", nulls_last=True, maintain_order=True)


@settings(max_examples=25)
@given(
    run=runs(),
    sort=st.sampled_from(["step", "loss", "m"]),
    direction=st.sampled_from(["asc", "desc"]),
    first=st.none() | st.integers(1, 45),
    last=st.none() | st.integers(1, 45),
    low=st.none() | few.filter(math.isfinite),
    high=st.none() | few.filter(math.isfinite),
    length=st.integers(4, 12),
)
def test_the_table_is_sorted_and_searched_as_polars_does(
    run, sort, direction, first, last, low, high, length
):
    losses, measurements = run
    if not measurements and sort == "m":
        sort = "loss"
    wanted = expected(losses, measurements, sort, direction, first, last, low, high)
    query = {"sort": sort, "direction": direction, "length": length}
    ends = {"first": first, "last": last, "low": low, "high": high}
    query |= {key: repr(value) for key, value in ends.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "run", losses, measurements)
        page = Application(Path(folder))
        rows = []
        for start in range(0, max(1, len(wanted)), length):
            answer = page.json("/api/runs/run/table", start=start, **query)
            assert (answer["total"], answer["filtered"]) == (len(losses), len(wanted))
            assert answer["start"] == start
            rows += answer["rows"]
        assert [row[0] for row in rows] == wanted["step"].to_list()
        for step, text, *others in rows:
            assert np.float32(text) == losses[step - 1] or math.isnan(losses[step - 1])
            if measurements:
                value = {s: v for _, s, v in measurements}.get(step)
                if value is None:
                    assert others == [""]
                else:
                    assert np.array_equal(np.float32(others[0]), np.float32(value), equal_nan=True)
        for place, step in list(enumerate(wanted["step"]))[::7]:
            answer = page.json("/api/runs/run/table", around=step, **query)
            assert answer["start"] == place - place % length
            assert step in [row[0] for row in answer["rows"]]


@settings(max_examples=25)
@given(losses=losses_of_a_run, points=st.integers(2, 10), ends=st.tuples(*[st.integers(1, 45)] * 2))
def test_a_curve_keeps_every_extreme_of_its_range(losses, points, ends):
    first, last = ends
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "run", losses)
        page = Application(Path(folder))
        answer = page.json("/api/runs/run/curve", first=first, last=last, points=points)
    shown = {step: loss for step, loss in enumerate(losses, 1) if first <= step <= last}
    assert answer["total"] == len(shown)
    got = dict(zip(answer["steps"], map(float, answer["values"]), strict=True))
    for step, value in got.items():
        assert np.float32(value) == shown[step] or math.isnan(shown[step])
    finite = [value for value in shown.values() if math.isfinite(value)]
    if finite:
        assert {min(finite), max(finite)} <= {float(np.float32(value)) for value in got.values()}
    if shown:
        assert {min(shown), max(shown)} <= got.keys()
    assert any(map(math.isfinite, got.values())) == bool(finite)
    assert all(map(math.isfinite, got.values())) == (len(finite) == len(shown))
    assert len(got) <= 3 * max(1, points // 2) + 2


def test_numbers_that_are_not_finite_are_texts_and_others_have_the_fewest_digits(write_run, page):
    write_run("run", [0.1, math.nan, math.inf, -math.inf], [("m", 2, 0.1 + 0.2)])
    assert page.json("/api/runs/run/curve")["values"] == [0.1, "nan", "inf", "-inf"]
    table = page.json("/api/runs/run/table")
    assert table["columns"] == ["step", "loss", "m"]
    assert table["rows"] == [
        [1, "0.1", ""], [2, "nan", "0.30000000000000004"], [3, "inf", ""], [4, "-inf", ""],
    ]  # fmt: skip


def test_losses_of_double_precision_keep_it(write_run, page):
    write_run("run", [0.1 + 0.2, 0.3], loss_dtype="float64")
    assert page.json("/api/runs/run/curve")["values"] == [0.30000000000000004, 0.3]
    assert page.json("/api/runs/run/table", high="0.3")["filtered"] == 1


def test_the_text_of_a_loss_finds_it(write_run, page):
    write_run("run", [0.1, 0.2, 0.3])
    assert page.json("/api/runs/run/table", low="0.1", high="0.1")["filtered"] == 1


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(3, 3, [3]), (2, 4, [2, 3, 4]), (4, "", [4, 5]), ("", 2, [1, 2]), (4, 2, []), (9, 9, []),
     (0, 0, []), (-3, -1, []), ("", "", [1, 2, 3, 4, 5]), (10**17, "", []),
     ("", 10**17, [1, 2, 3, 4, 5])],
)  # fmt: skip
def test_rows_are_those_between_two_steps(write_run, page, first, last, steps):
    write_run("run", [5, 4, 3, 2, 1])
    answer = page.json("/api/runs/run/table", first=first, last=last)
    assert [row[0] for row in answer["rows"]] == steps


@pytest.mark.parametrize(
    ("query", "message"),
    [({"first": "abc"}, "first 'abc' is not a whole number"),
     ({"last": "1" * 400}, "is not a whole number"), ({"low": "x"}, "losses from 'x': not a number"),
     ({"high": "nan"}, "losses to 'nan': not a number"),
     ({"sort": "m"}, "no column 'm' to sort by; the columns are step, loss"),
     ({"direction": "up"}, "asc or desc"), ({"start": "x"}, "start 'x' is not a whole number"),
     ({"length": "9" * 30}, "not a whole number")],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_the_cure(write_run, page, query, message):
    write_run("run", [1.0])
    answer = page.ask("/api/runs/run/table", params=query)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_a_page_beyond_the_end_is_the_last_and_a_step_that_is_filtered_out_is_not_looked_for(
    write_run, page
):
    write_run("run", [5, 4, 3, 2, 1])
    assert page.json("/api/runs/run/table", start=400, length=2)["start"] == 4
    assert page.json("/api/runs/run/table", start=-3, length=2)["start"] == 0
    answer = page.json("/api/runs/run/table", around=5, first=1, last=4, length=2, start=2)
    assert [row[0] for row in answer["rows"]] == [3, 4]
    assert len(page.json("/api/runs/run/table", length=10**6)["rows"]) == 5


def test_as_many_rows_are_had_at_once_as_the_page_copies(write_run, page):
    write_run("run", [0.5] * 12_000)
    assert len(page.json("/api/runs/run/table", length=10_000)["rows"]) == 10_000


def test_the_file_of_losses_has_the_rows_that_the_table_shows(write_run, page):
    run = write_run("é", [2.0, math.nan, 1.0], [("m", 3, 0.5), ("lr", 1, 0.1)], **FACTS)
    answer = page.ask("/api/runs/é/losses.csv", params={"sort": "loss", "first": 1, "last": 3})
    assert answer.headers["content-type"].startswith("text/csv")
    assert "filename*=UTF-8''%C3%A9%20losses.csv" in answer.headers["content-disposition"]
    frame = everystep.open(run).table_frame().sort("loss")
    assert answer.text == frame.write_csv(null_value="")


def test_a_learning_rate_holds_until_it_changes(write_run, page):
    measured = [("lr", 2, 0.1), ("lr", 4, 0.05), ("m", 2, 7.0)]
    run = write_run("run", [4.0, 3.0, 2.0, 1.0], measured, **FACTS)
    held = [None, 0.1, 0.1, 0.05]
    frame = everystep.open(run).table_frame()
    assert (frame["lr"].to_list(), frame["m"].to_list()) == (held, [None, 7.0, None, None])
    assert everystep.open(run).table_frame(2).equals(frame[2:])
    assert everystep.open(run).table().frame["lr"].to_list() == held
    rows = page.json("/api/runs/run/table", sort="lr", direction="desc")["rows"]
    assert [row[2] for row in rows] == ["0.1", "0.1", "0.05", ""]


def test_a_measurement_of_state_0_is_in_the_curve_but_in_no_row(write_run, page):
    write_run("run", [2.0, 1.0], [("m", 0, 7.0), ("m", 2, 5.0)])
    curve = page.json("/api/runs/run/curve", measurement="m")
    assert (curve["steps"], curve["values"], curve["first"], curve["last"]) == ([0, 2], [7.0, 5.0], 0, 2)
    rows = page.json("/api/runs/run/table", sort="m", direction="desc")["rows"]
    assert rows == [[2, "1.0", "5.0"], [1, "2.0", ""]]
    assert page.ask("/api/runs/run/curve?measurement=n").status_code == 400


def test_measurements_named_like_columns_stand_beside_them(write_run, page):
    write_run("run", [2.0], [("loss", 1, 3.0), ("step", 1, 4.0)])
    table = page.json("/api/runs/run/table", sort="loss (measured)")
    assert table["columns"] == ["step", "loss", "loss (measured)", "step (measured)"]
    assert table["rows"] == [[1, "2.0", "3.0", "4.0"]]


def test_a_run_of_no_steps(write_run, page):
    write_run("run")
    assert page.json("/api/runs/run/curve") == {
        "first": 1, "last": 0, "total": 0, "steps": [], "values": [],
    }  # fmt: skip
    assert page.json("/api/runs/run/table", sort="loss", around=1)["rows"] == []
    assert page.json("/api/runs/run/sparkline")["path"] == ""


def losses_now(page):
    return page.json("/api/runs/run/curve", points=100_000)["values"]


def test_what_is_new_is_read_and_what_was_taken_back_is_forgotten(write_run, page):
    run = write_run("run", range(1, 10_001), [("m", step, step) for step in range(1, 9001)])
    assert len(losses_now(page)) == 10_000
    assert page.json("/api/runs/run/curve", measurement="m", points=100_000)["total"] == 9000
    sql(run, "INSERT INTO steps VALUES (10001, 7)", "INSERT INTO measurements VALUES ('m', 10001, 7)")
    assert losses_now(page)[-2:] == [10_000, 7]
    assert page.json("/api/runs/run/curve", measurement="m")["total"] == 9001
    sql(run, "DELETE FROM steps WHERE step > 500", "INSERT INTO steps VALUES (501, NULL)")
    assert losses_now(page)[499:] == [500, "nan"]
    sql(run, "UPDATE steps SET loss = -1 WHERE step > 400", "DELETE FROM measurements WHERE step < 9")
    assert losses_now(page)[398:] == [399, 400] + [-1] * 101
    assert page.json("/api/runs/run/curve", measurement="m")["total"] == 8993
    sql(run, "UPDATE measurements SET value = 3 WHERE step > 8000")
    assert page.json("/api/runs/run/curve", measurement="m")["values"][-1] == 3


def test_a_run_made_again_under_its_name_is_another_run(write_run, page):
    run = write_run("run", [1.0, 2.0, 3.0])
    assert losses_now(page) == [1, 2, 3]
    shutil.rmtree(run)
    assert page.ask("/api/runs/run/curve").status_code == 404
    write_run("run", [9.0, 2.0, 3.0, 4.0], started="2026-02-02T00:00:00+00:00")
    assert losses_now(page) == [9, 2, 3, 4]


def test_steps_are_read_while_they_are_written(write_run, page):
    run = write_run("run", status="running")
    database = Database.change(run / "run.sqlite")
    for first in range(1, 200, 20):
        with database.transaction():
            database.write_losses(first, range(first, first + 20))
        assert losses_now(page) == list(range(1, first + 20))
    database.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM steps WHERE step = 2",
        "UPDATE steps SET loss = 'x' WHERE step = 2",
        "UPDATE facts SET value = '{'",
    ],
)
def test_a_database_that_somebody_changed_is_no_run(write_run, page, statement):
    run = write_run("run", [1.0, 2.0, 3.0])
    sql(run, statement)
    answer = page.ask("/api/runs/run/curve")
    assert answer.status_code == 404
    assert "database was changed" in answer.json()["error"]
