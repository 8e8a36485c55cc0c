"""The worst rows of a step, as the server answers: ranked, with what is in them, and what is unknown."""

import csv
import json
import select
import socket

import pytest
import torch
from tests.descent import looped, of_table
from tests.page.serving import PATIENCE
from tests.page.test_worker import slow
from torch import nn

import everystep

CLASSES = ["setosa", "versicolor", "virginica"]
COLOURS = ["red", "blue", ""]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table with numbers, words and classes with names."""
    path = tmp_path_factory.mktemp("table") / "flowers.csv"
    rows = [[n % 7 / 2, 1000 + n % 5, COLOURS[n % 3], CLASSES[n * n % 3]] for n in range(30)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["long", "wide", "colour", "kind"], *rows])
    return path, rows


@pytest.fixture(scope="module")
def flowers(server, table):
    settings = {"steps": 6, "batch_size": 10, "data": {"missing": "mean", "scale": "standard"}}
    experiment = of_table(table[0], "kind", "Linear(4, 3)", loss="CrossEntropyLoss", **settings)
    directory = server.directory / "flowers"
    return everystep.train_experiment(experiment, run=directory, progress=False)


def ranked(server, run, step):
    answer = server.client.get(f"/api/runs/{run}/steps/{step}/rows")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_row_of_a_table_has_its_columns_in_their_own_units(server, flowers, table):
    answer = ranked(server, "flowers", 2)
    assert [column["name"] for column in answer["columns"]] == ["kind", "long", "wide", "colour"]
    assert [column["is_number"] for column in answer["columns"]] == [False, True, True, False]
    for row in answer["rows"].values():
        long, wide, colour, kind = table[1][row["row"]]
        assert row["values"] == [kind, pytest.approx(long, abs=1e-5), pytest.approx(wide), colour]
    assert any("mean of these" in line for line in answer["about"])
    assert any("a missing number" in line for line in answer["about"])


def test_texts_of_a_loops_batch_and_losses_that_are_not_finite(server):
    batch = {"x": torch.ones(3, 2), "word": ["a", "b", "<i>"], "id": torch.tensor([7, 8, 2**60])}
    batch["x"][1] = torch.nan
    run = server.directory / "loop"
    looped(nn.Linear(2, 1), [batch], lambda model, given: model(given["x"]).square().mean(), run=run)
    answer = ranked(server, "loop", 1)
    json.dumps(answer, allow_nan=False)
    assert answer["orders"]["loss"][0] == 1 and answer["rows"]["1"]["loss"] == "nan"
    assert [column["name"] for column in answer["columns"]] == ["id", "word"]
    assert answer["rows"]["2"]["values"] == [str(2**60), "<i>"]
    assert "row: its place in the batch" in answer["about"]


def test_who_goes_from_step_to_step_does_not_wait_for_it(server, flowers):
    directory = server.directory / "slow"
    everystep.train_experiment("two-layer", {"steps": 4}, run=directory, progress=False)
    slow(directory, size=2_000)
    cookie = "; ".join(f"{name}={value}" for name, value in server.client.cookies.items())
    host = f"127.0.0.1:{server.port}"
    asked = f"GET /api/runs/slow/steps/2/rows HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as asking:
        asking.sendall(asked.encode())
        for step in (1, 2, 3):
            assert server.client.get(f"/api/runs/flowers/steps/{step}").status_code == 200
        assert not select.select([asking], [], [], 0)[0]  # it has no answer yet
