"""Where a number comes from, as the server answers."""

import json

import pytest

import everystep


@pytest.fixture(scope="module")
def run(server):
    return everystep.train_experiment("two-layer", {"steps": 12}, run=server.directory / "chapter")


def ask(server, step, **query):
    return server.client.get(f"/api/runs/chapter/steps/{step}/why", params=query)


def asked(server, step, **query):
    answer = ask(server, step, **query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_number_of_a_tensor_and_those_that_went_in(run, server):
    answer = asked(server, 7, id="gradients/0.weight", index="3,5")
    json.dumps(answer, allow_nan=False)
    expected = run.why(7, "gradients['0.weight'][3, 5]", terms=8)
    assert answer["number"]["name"] == expected.number.name
    assert float(answer["number"]["text"]) == pytest.approx(expected.number.value, rel=1e-7)
    (group,) = answer["groups"]
    assert (len(group["terms"]), group["count"]) == (8, 64)
    first, second = group["terms"][0]["numbers"].values()
    assert second["row"] == expected.groups[0].terms[0].numbers["mat2"].row
    assert (first["is_linked"], second["is_linked"]) == (True, False)
    following = asked(server, first["step"], of=first["name"])
    assert following["number"] == first


def test_what_an_operation_was_given_is_followed_to_what_made_it(run, server):
    step = run[7]
    number, name = next(
        (number, name)
        for number, seen in enumerate(step.operations)
        for name in seen.inputs
        if name.startswith("threshold_backward~")
    )
    answer = asked(server, 7, id=f"operations/{number}/inputs/{name}", index="3,11")
    value = step.operations[number].inputs[name][3, 11].item()
    assert float(answer["number"]["text"]) == pytest.approx(value, rel=1e-7)
    assert step.operations[answer["operation"]].operation.name == "threshold_backward"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"id": "gradients/0.weight", "index": "300,5"}, "shape (100, 1000)"),
        ({"id": "gradients/0.weight", "index": "a"}, "write 3,5"),
        ({"id": "gradients/nothing", "index": "1"}, "no tensor"),
        ({"id": "operations/0/results/addmm", "index": "1"}, "no number at (1,)"),
        ({"of": "max(loss)"}, "not a computation"),
        ({}, "no tensor given"),
    ],
)
def test_what_is_not_there_is_an_error(run, server, query, message):
    answer = ask(server, 7, **query)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
