"""A batch in the terminal: names of classes, strings, and what statistics of complex numbers are of."""

import pytest
import torch
from tests.descent import looped, of_table
from torch import nn

import everystep
from everystep.views.batch_text import LONGEST_TEXT, MOST_ITEMS
from everystep.views.formatting import TIMES
from everystep.views.step_text import step_text

NAMES = ["setosa", "versicolor", "virginica"]


def text_of(run, number, **options):
    return step_text(run[number], run.facts, **options).plain


@pytest.fixture
def flowers(tmp_path):
    """A run on a table of flowers, in which classes have names."""
    rows = [f"{n % 7},{n % 5},{NAMES[n % 3]}" for n in range(12)]
    (tmp_path / "flowers.csv").write_text("\n".join(["long,wide,kind", *rows]))
    layers = "Linear(2, 3)", "ReLU()", "Linear(3, 3)"
    experiment = of_table(tmp_path / "flowers.csv", "kind", *layers, loss="CrossEntropyLoss", steps=1)
    return everystep.train_experiment(experiment, run=tmp_path / "run", progress=False)


def test_classes_are_shown_by_their_names(flowers):
    assert "classes of y: setosa (4), versicolor (4), virginica (4)" in text_of(flowers, 1)
    all_rows = text_of(flowers, 1, phase="batch", values=True, width=500)
    assert f"row by row: {', '.join(NAMES * 4)}\n" in all_rows
    names = [seen.operation.operator for seen in flowers[1].operations]
    operation = text_of(flowers, 1, operation=names.index("aten.nll_loss_forward.default"))
    assert "classes: 0 setosa, 1 versicolor, 2 virginica" in operation
    assert "columns: setosa, versicolor, virginica" in operation
    batch = flowers[1].data()["batch"]
    assert (batch["classes"], batch["targets"]) == (NAMES, NAMES * 4)


def test_what_is_of_classes_is_said_and_no_more(flowers):
    """A hidden layer as wide as there are classes has no column for each."""
    content = flowers[1].data()
    found = {id: seen["classes"] for id, seen in content["tensors"].items() if "classes" in seen}
    assert found["batch.y"] == "values"
    assert found["activations/2"] == "columns"
    assert {"activations/0", "activations/1", "batch.x"}.isdisjoint(found)
    assert not any(id.startswith(("parameters", "updates", "gradients")) for id in found)
    of_model = [
        f"operations/{one['number']}/results/{result['name']}"
        for one in content["operations"]
        for result in one["results"]
        if one["module"] in ("0", "1")
    ]
    assert len(of_model) > 2 and not set(of_model) & set(found)


def test_a_batch_without_classes_names_none(small):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = everystep.train(model, (x, y), loss=nn.MSELoss(), optimizer=optimizer, steps=1, progress=False)
    assert "classes" not in text_of(run, 1)
    assert run[1].data()["batch"]["classes"] is None


def test_strings_and_complex_numbers_of_a_batch():
    batch = {
        "x": torch.ones(2, 4),
        "wave": torch.ones(2, 2, dtype=torch.complex64),
        "text": ["a\x1b[2J", "b"],
        "about": {"epoch": 3, "words": [f"word {n}" for n in range(100)]},
        "long": "z" * 999,
    }

    def loss_of(model, each):
        return model(each["x"]).sum()

    run = looped(nn.Linear(4, 3), [batch], loss_of, run="./run", optimizer=None)
    text = text_of(run, 1, width=80)
    assert "\n  text         'a\\x1b[2J', 'b' (2)\n" in text
    assert "\n  about.epoch  3\n" in text
    [words] = [line for line in text.splitlines() if "about.words" in line]
    assert words.startswith("  about.words  'word 0', ") and words.endswith("… (100)")
    assert len(words) == 80
    assert "'word 99' (100)" in text_of(run, 1, phase="batch", values=True)
    assert f"2{TIMES}2, |z|" in text
    assert text.endswith("\n|z|: numbers are complex, statistics of absolute values\n")
    told = run[1].data(values=True)
    values = {each["name"]: each["texts"] for each in told["batch"]["values"]}
    assert values["about.epoch"] == ["3"] and values["about.words"][99] == "word 99"
    shortened = {each["name"]: each for each in run[1].data()["batch"]["values"]}
    words = shortened["about.words"]
    assert (len(words["texts"]), words["count"]) == (MOST_ITEMS, 100)
    assert len(shortened["long"]["texts"][0]) == LONGEST_TEXT + 1
    assert told["tensors"]["batch/wave"]["statistics_of"] == "absolute values"
    assert "statistics_of" not in told["tensors"]["batch.x"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_of_a_step_fit_the_terminal(flowers, width):
    text = text_of(flowers, 1, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert ("norm before" in text) == (width > 60)
