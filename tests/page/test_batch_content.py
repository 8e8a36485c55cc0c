"""Contents of a batch other than numbers on the page: plain values, and the names of classes."""

import pytest
import torch
from torch import nn

import everystep
from everystep.views.batch import LONGEST_TEXT, MOST_ITEMS


def content_of(run, step):
    return run[step].data()


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A run on a table of flowers, in which classes have names."""
    directory = tmp_path_factory.mktemp("flowers")
    rows = [f"{n % 7},{n % 5},{['setosa', 'versicolor', 'virginica'][n % 3]}" for n in range(30)]
    (directory / "flowers.csv").write_text("\n".join(["long,wide,kind", *rows]))
    experiment = {
        "steps": 2,
        "batch_size": 10,
        "data": {"source": "table", "path": str(directory / "flowers.csv"), "target": "kind"},
        "model": {"layers": ["Linear(2, 3)", "ReLU()", "Linear(3, 3)"]},
        "loss": {"name": "CrossEntropyLoss"},
        "optimizer": {"name": "SGD", "lr": 0.1},
    }
    return everystep.train_experiment(experiment, directory=directory / "flowers", progress=False)


def test_classes_have_the_names_of_the_data(flowers):
    content = content_of(flowers, 2)
    names = ["setosa", "versicolor", "virginica"]
    assert content["batch"]["classes"] == names
    assert content["batch"]["targets"] == [names[n] for n in flowers[2].batch.y.tolist()]


def test_what_is_of_classes_is_said_and_no_more(flowers):
    """A hidden layer as wide as there are classes has no column for each."""
    content = content_of(flowers, 2)
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


def test_strings_and_numbers_of_a_batch_are_told(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    words = [f"word {n}" for n in range(100)]
    given = {
        "x": torch.ones(2, 4),
        "text": ["a", "<b>"],
        "about": {"epoch": 3, "words": words},
        "long": "z" * 999,
    }
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for batch in recording.steps([given, given]):
            loss = model(batch["x"]).sum()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    told = content_of(everystep.open(tmp_path / "run"), 2)["batch"]
    values = {one["name"]: one for one in told["values"]}
    assert values["text"] == {"name": "text", "texts": ["a", "<b>"], "count": 2}
    assert values["about.epoch"]["texts"] == ["3"]
    assert (len(values["about.words"]["texts"]), values["about.words"]["count"]) == (MOST_ITEMS, 100)
    assert len(values["long"]["texts"][0]) == LONGEST_TEXT + 1
    assert told["classes"] is None
