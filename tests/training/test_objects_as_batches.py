"""Batches of classes of other people: their tensors are known by the names that their users know."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tests.descent import looped, recorded_as_it_is
from tests.snapshots import take_snapshots_every
from torch import nn
from torch.utils.data import TensorDataset

import everystep
from everystep.errors import RunError


class Storage(MutableMapping):
    """A dict that is wrapped, and bookkeeping about it, as of a graph."""

    def __init__(self, mapping):
        self._mapping, self._sizes = mapping, {name: torch.ones(1) for name in mapping}

    def __getitem__(self, name):
        return self._mapping[name]

    def __setitem__(self, name, value):
        self._mapping[name] = value

    def __delitem__(self, name):
        del self._mapping[name]

    def __iter__(self):
        return iter(self._mapping)

    def __len__(self):
        return len(self._mapping)


class Graph:
    """Its attributes are those of a storage; calls of anything else fail."""

    def __init__(self, x, y):
        self._store, self._parent = Storage({"x": x, "y": y}), self
        self._kinds = {("a", "to", "b"): Storage({"edge_index": torch.zeros(2, 3)})}

    def __getattr__(self, name):
        return vars(self)["_store"][name]

    @property
    def computed(self):
        raise RuntimeError("a property was read")

    def __iter__(self):
        raise RuntimeError("a method was called")

    __len__ = __eq__ = __call__ = __iter__
    __hash__ = None


@dataclass(frozen=True, slots=True)
class Slots:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "slots"


class Fields:
    def __init__(self, x, y):
        self.size, self._fields = (4, 4), {"x": SimpleNamespace(tensor=x), "y": y}


class Leading:
    """It leads to much that is no batch."""

    def __init__(self, x, y):
        self.x, self._y, self.model = x, y, nn.Linear(2, 2)
        self.data, self.vocabulary = (
            TensorDataset(x),
            {number: torch.ones(1) for number in range(20_000)},
        )
        self.settings = SimpleNamespace(batch=self, rate=0.1)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Graph, ["x", "y", "a.to.b.edge_index"]),
        (Slots, ["x", "y"]),
        (Fields, ["x.tensor", "y"]),
        (Leading, ["x", "_y"]),
        (lambda x, y: SimpleNamespace(target=y, x=x), ["target", "x"]),
        (lambda x, y: [{"graph": Slots(x, y)}], ["0.graph.x", "0.graph.y"]),
    ],
    ids=["graph", "slots", "fields", "leading", "namespace", "nested"],
)
def test_an_object_is_a_batch_of_the_tensors_in_its_attributes(tmp_path, kind, names):
    def make():
        model = nn.Linear(6, 3)
        pairs = [(torch.randn(4 + n % 2, 6), torch.randint(0, 3, (4 + n % 2,))) for n in range(4)]
        batches = [kind(x, y) for x, y in pairs]

        def loss_of(model, batch, count):
            x, y = pairs[count]
            return nn.functional.cross_entropy(model(x), y)

        return model, torch.optim.SGD(model.parameters(), lr=0.1), batches, loss_of

    run = recorded_as_it_is(tmp_path / "run", make)
    assert [*run[2].batch.tensors] == names
    if len(names) == 2 and "tensor" not in names[0]:
        assert len(run.rows(2).loss) == 5


def test_an_object_without_tensors_is_its_class():
    run = looped(nn.Linear(2, 1), [Fields("a", "b")] * 2, lambda model, _: model(torch.ones(2)).sum())
    assert (run[1].batch.tensors, run[1].batch.nested) == ({}, "<Fields>")


class Carried(SimpleNamespace):
    def get(self, name):
        return vars(self).get(name)

    def __setitem__(self, name, value):
        setattr(self, name, value)


@pytest.mark.parametrize("kind", [dict, Carried])
def test_what_a_loop_puts_into_a_batch_is_not_data(tmp_path, kind):
    """It comes again with the batch, and the loop may have computed it from the parameters."""
    model, batch = nn.RNNCell(2, 3), kind(x=torch.ones(4, 2))

    def loss_of(model, batch):
        before = batch.get("hidden")
        hidden = model(batch.get("x"), before)
        batch["hidden"] = hidden.detach()
        return hidden.square().mean()

    run = looped(model, [batch] * 6, loss_of, run=tmp_path / "run")
    assert [*run[3].batch.tensors] == ["x"]
    assert run.verify(processes=1, progress=False).is_exact
    with pytest.raises(RunError, match="read a tensor that is in no part and no batch"):
        run.what_if(2, lr=0.5, progress=False)


@pytest.mark.parametrize("kind", [dict, Carried])
def test_a_loop_resumes_although_its_batches_do_not_have_yet_what_it_had_put_there(
    tmp_path, monkeypatch, kind
):
    take_snapshots_every(monkeypatch, 3)

    def loop(epochs):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        batches = [kind(x=torch.randn(4, 2)) for _ in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = {"model": model, "optimizer": optimizer, "run": tmp_path / "run"}
        with everystep.record(**parts, resume=True) as recording:
            for _ in recording.epochs(epochs):
                for batch in recording.steps(batches):
                    if batch.get("squares") is None:
                        batch["squares"] = batch.get("x").square()
                    loss = model(batch.get("squares")).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    recording.log(loss=loss)
                    if recording.step_count == 10 and epochs == 3:
                        raise KeyboardInterrupt
        return recording.run

    with pytest.raises(KeyboardInterrupt):
        loop(3)
    resumed = loop(4)
    assert resumed.verify(processes=1, progress=False).is_exact
    assert resumed.losses["loss"].to_list() == loop_by_hand()


def loop_by_hand():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    batches = [torch.randn(4, 2).square() for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches * 4:
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
