"""Views that lie at another place in each step: one program for all places."""

import json
import random

import pytest
import torch
from tests.descent import looped, recorded_as_it_is
from torch import nn

from everystep.errors import RunError

STEPS = 40


def _places(high, count=1):
    """Return places that Python chooses."""
    return [random.randrange(high) for _ in range(count)]


def _crop(model, x, t):
    """A random crop of the batch in both directions, half of them transposed."""
    i, j = _places(5, 2)
    crop = torch.ops.aten.slice.Tensor(x)[:, i : i + 8][:, :, j : j + 8]
    return model((crop.transpose(1, 2) if t % 2 else crop).flatten(1)).square().mean()


def _windows(model, x, t):
    """Windows of the batch, laid side by side."""
    flat = x.flatten()
    return model(torch.stack([flat[i : i + 64] for i in _places(500, 6)])).square().mean()


def _queue(model, x, t):
    """A queue in a buffer, written at a pointer in another buffer."""
    found = model(x[:, :8, :8].flatten(1))
    pointer = int(model.pointer)
    loss = (found @ model.queue.clone()).logsumexp(1).mean()
    with torch.no_grad():
        model.queue[:, pointer : pointer + 4] = found.detach().T
    model.pointer[0] = (pointer + 4) % 32
    return loss + model.queue[:, pointer].sum()


def _position(model, x, t):
    """Positions of a result that gradients flow through, and of a parameter."""
    i, j = _places(8, 2)
    found = model[0](x[:, :8, :8].flatten(1))
    return (found[:, i : i + 4].tanh().mean(1) * found[:, j]).sum() + model[0].weight[i].norm()


def _in_place(model, x, t):
    """A copy of the batch, overwritten in part by what gradients flow through."""
    (i,) = _places(8)
    copy = x[:, :8, :8].flatten(1).clone()
    copy[:, i : i + 8] = model(copy[:, :].detach() + 1)[:, :8]
    return (copy.square() * copy[:, i : i + 1].detach()).mean() + copy[:, i + 2].sum()


def _odd(model, x, t):
    """Views of moving views: by strides, of another dtype, unfolded, split, in place."""
    (i,) = _places(4)
    part = x[:, i : i + 8, :8]
    strided = part.as_strided((4, 64), (100, 1))
    numbers = part.view(torch.int32).float().mul(1e-9)
    unfolded = part.unfold(2, 4, 4).mean(-1)
    pieces = part.split(4, 1)
    with torch.no_grad():
        part.unsqueeze_(0).mul_(0.9)
    loss = model(strided).mean() + numbers.mean() * unfolded.std() + pieces[1].sum()
    return loss.square() * abs(x[0, i, i].item())


def _lengths(model, x, t):
    """Views of two lengths; the prefix of a step, which does not move, has another program."""
    (i,) = _places(4)
    width = 8 if t % 3 else 4
    part = x[:, i : i + width, :8] if t % 2 else x[:, :width, :8]
    return model(part.repeat(1, 8 // width, 1).flatten(1)).square().mean()


def _around(model, x, t):
    """Rows of the data that the batch is a part of, in the batch and around it."""
    i = random.choice((0, 4 * (t % 7), 9))
    rows = model.__dict__["data"][i : i + 4]
    return sum(model(part[:, :8, :8].flatten(1)).square().mean() for part in (x, rows))


def _frozen(model, x, t):
    """A row of a weight that begins to get gradients in the middle."""
    model[0].weight.requires_grad_(t >= 15)
    (i,) = _places(8)
    return model(x[:, :8, :8].flatten(1)).square().mean() + model[0].weight[i].square().sum()


def _expanded(model, x, t):
    """Rows of an expanded tensor, which all lie at the same place, and the gradients of all rows."""
    (i,) = _places(30)
    wide = model[0].bias.expand(30, 12)
    (gradient,) = torch.autograd.grad(wide[i].square().sum(), wide)
    scale = torch.arange(30.0).view(30, 1)
    return model(x[:, :8, :8].flatten(1)).square().mean() * (gradient * scale).sum().cos()


def _carried(model, x, t):
    """A state that is a view at another place after each step, and a view of it in the next step."""
    i, j = _places(4, 2)
    found = model(x[:, :8, :8].flatten(1)) + model.carried[j]
    model.carried = found.repeat(3, 1)[2 * i : 2 * i + 4].detach()
    return found.square().mean()


class Queueing(nn.Sequential):
    """A model with a queue."""

    def __init__(self):
        super().__init__(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12))
        self.register_buffer("queue", torch.randn(12, 32))
        self.register_buffer("carried", torch.zeros(4, 12))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))


def _recorded(run, loss_of, steps=STEPS):
    """Train on seven parts of the same data in turn; return the run."""

    def make():
        model = Queueing()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        model.__dict__["data"] = data = torch.randn(28, 12, 12)
        return model, optimizer, [data.split(4)[t % 7] for t in range(steps)], loss_of

    return recorded_as_it_is(run, make)


LOOPS = {
    **{_odd: 6, _crop: 10, _around: 35, _windows: 6, _lengths: 12, _queue: 6},
    **{_frozen: 8, _position: 6, _expanded: 4, _in_place: 12, _carried: 20},
}


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("loss_of", LOOPS)
def test_all_places_have_a_program(loss_of, tmp_path):
    run = _recorded(tmp_path / "run", loss_of)
    assert run.facts.training.loop.programs <= LOOPS[loss_of]
    assert all(run[step].is_exact for step in (1, 17, 30, STEPS))


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    return _recorded(tmp_path_factory.mktemp("moving") / "run", _crop, steps=24)


def test_an_opened_step_has_its_own_places(cropped):
    """The operations of each step read the part of the batch that it has used."""
    starts = set()
    for step in map(cropped.__getitem__, range(5, 25)):
        x = step.batch.tensors["x"]
        taken = step.operations[0].inputs
        first = next(t for name, t in taken.items() if name.startswith("x~"))
        found = [(i, j) for i in range(5) for j in range(5) if x[0, i, j] == first[0, 0, 0]]
        starts.update(found)
    assert len(starts) > 5


@pytest.mark.sweep
def test_a_run_in_float64_has_the_same_places(cropped):
    found = cropped.rerun(precision="float64", progress=False)
    assert found.losses.tolist() == pytest.approx(cropped.losses["loss"].to_list(), rel=1e-4)


@pytest.mark.parametrize("place", [-1, 10**12, 0.5, None])
def test_a_place_outside_of_the_batch_is_refused(place, cropped):
    from everystep.program.interpreter import Interpreter
    from everystep.program.step_program import Program

    paths = sorted((cropped.directory / "programs").iterdir())
    moving = next(path for path in paths if json.loads(path.read_text()).get("moves"))
    program = Program.from_json(moving.read_text())
    interpreter = Interpreter(program, torch.device("cpu"))
    with pytest.raises(RunError, match="do not fit its program"):
        interpreter.at([place] * len(program.moves) if place is not None else [])


def test_the_same_call_may_be_made_on_tensors_of_other_dimensions():
    def loss_of(model, batch):
        number, x = batch
        part = x.reshape(-1)[:3] if number % 2 else x[:, 1:4]
        return model(x).square().mean() + part.sum()

    torch.manual_seed(0)
    batches = enumerate([torch.randn(4, 6) for _ in range(6)])
    assert looped(nn.Linear(6, 1), batches, loss_of).verify().is_exact
