"""What torch computes in another way while something watches it: a recorded loop has its own bits.

Each case is a loop of somebody else's kind. It is run alone, and recorded.
"""

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.descent import as_alone, descend, recorded_as_it_is
from torch import nn
from torch.nn import functional

import everystep
from everystep.recording.contents import inputs_of

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def usual(model, loss_of, lr=0.1, **others):
    """Return the parts of a loop, and its step on a batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)

    def step(x):
        return descend(optimizer, loss_of(x))

    return {"model": model, "optimizer": optimizer} | others, step


def network():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


def noisy_or(out):
    return 1 - (1 - torch.sigmoid(out)).prod(dim=1)


@case
def a_product_and_a_hook_that_changes_the_state():
    model, seen = network(), torch.zeros(8)

    def note(gradient):
        seen.add_(gradient.sum((0, 1)))
        model[2].bias.detach().mul_(0.999)
        return gradient * 0.5

    def loss(x):
        out = model(x)
        out.register_hook(note)
        return noisy_or(out).log().mean()

    parts, step = usual(model, loss)

    def noted(x):
        found = step(x)
        with torch.no_grad():
            model[0].weight.add_(seen[0] * 1e-3)
        return found

    return parts | {"seen": seen}, noted


@case
def a_teacher_in_eval():
    student, teacher = network(), encoder()

    def loss(x):
        with torch.no_grad():
            target = teacher(x)
        return functional.mse_loss(student(x), target)

    return usual(student, loss, teacher=teacher)


@case
def a_penalty_on_the_gradient_of_a_product():
    model = network()

    def loss(x):
        x = x.clone().requires_grad_()
        out = noisy_or(model(x)).sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return out * 0.1 + (gradient.norm(dim=-1) - 1).square().mean()

    return usual(model, loss)


@case
def a_filled_mask():
    model = network()

    def loss(x):
        out = model(x)
        return (out.masked_fill(x > 0.3, out.mean()) * out).logsumexp(-1).mean()

    return usual(model, loss)


@case
def a_filled_part():
    """The node of the operation is within that of the view."""
    model = network()

    def loss(x):
        out = model(x)
        out[..., 1:].masked_fill_(x[..., 1:] > 0.3, out.mean())
        return (out * x).logsumexp(-1).mean()

    return usual(model, loss)


@case
def an_operation_that_fails_and_is_tried_in_another_way():
    model = network()

    def loss(x):
        out = model(x)
        try:
            out = out.add(torch.ones(5), alpha=2.0)
        except RuntimeError:
            out = out.add(torch.ones(8), alpha=3.0)
        return out.square().mean()

    return usual(model, loss)


@case
def a_graph_from_before_the_step():
    """The factor is an attribute of a node that no operation of the step shows."""
    model, scale, numbers = network(), nn.Parameter(torch.ones(8)), iter(range(1, 100))
    parts, _ = usual(model, None)
    optimizer, made = parts["optimizer"], []

    def step(x):
        made.append(scale * float(next(numbers)))
        loss = (model(x) * made[-2]).square().mean() if len(made) > 1 else model(x).square().mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        with torch.no_grad():
            scale.mul_(0.99) if scale.grad is None else scale.sub_(scale.grad.clamp(-1, 1) * 0.01)
        scale.grad = None
        optimizer.step()
        made[:] = [made[-1].detach() * scale]
        return loss

    return parts | {"scale": scale}, step


@case
def results_of_other_shapes_at_each_step():
    model, kept = network(), torch.empty(0)

    def loss(x):
        out = model(x)
        torch.masked_select(x, x > 0, out=kept.resize_(0))
        chosen = out[(x > 0.5) & (out.detach() < 1)]
        return out.square().mean() + kept.mean() * out.mean() + chosen.sum() / 100

    return usual(model, loss)


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_loop(name, tmp_path):
    def body(record):
        parts, step = CASES[name]()
        losses = []
        with record(**parts) as recording:
            for x in recording.steps(torch.randn(20, 4, 3, 8)):
                loss = step(x)
                losses.append(loss.item())
                recording.log(loss=loss)
        return losses, [part.state_dict() for part in parts.values() if isinstance(part, nn.Module)]

    run, (losses, _) = as_alone(tmp_path / "run", body)
    assert run.losses["loss"].to_list() == losses
    assert all(run[number].is_exact for number in (3, 9, 20))


def test_what_a_kernel_leaves_next_to_its_result_is_not_kept():
    """The memory of a mean is as large as that of its terms; what is there differs in each process."""
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps([(torch.randn(6, 8), torch.randn(6, 1)) for _ in range(3)]):
            loss = functional.mse_loss(noisy_or(out := model(x))[:, None], y)
            out.register_hook(lambda gradient: gradient * 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    [row] = recording.run.repeats(3, 3)
    kept = recording.run.contents(inputs_of(row.inputs, "step 3").given)
    storages = json.loads(recording.run.read_file(f"programs/{row.program}.json"))["storages"]
    sizes = {name: kept[f"input/{name}"].nbytes for name in storages if f"input/{name}" in kept}
    assert "loss" in sizes and sizes == {name: storages[name]["bytes"] for name in sizes}


def within_itself(model):
    model.me = model
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: torch.compile(m, backend="eager"), r"is compiled .* pass the uncompiled module"),
        (torch.jit.script, r"is scripted .* pass the module it was made from"),
        (within_itself, r"lies within itself, .* hold that one in a list"),
    ],
)
def test_a_module_that_no_run_can_hold_is_refused_with_the_cure(wrap, message):
    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(4, 8), torch.randn(4, 8)
    for begin in (
        lambda: everystep.record(model=model, optimizer=optimizer).__enter__(),
        lambda: everystep.train(lambda x: None, [data], parts={"model": model}, steps=1),
        lambda: everystep.train(model, data, loss=nn.MSELoss(), optimizer=optimizer, steps=1),
    ):
        with pytest.raises(everystep.UsageError, match=message):
            begin()
    assert not Path("runs").exists()


def test_memory_that_numpy_writes_is_kept_as_each_step_has_read_it():
    """It is large, and torch does not count what NumPy writes."""
    torch.manual_seed(0)
    memory = np.zeros((20_000, 64), dtype=np.float32)
    wrapped, model = torch.from_numpy(memory), nn.Linear(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = torch.arange(16)
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for step in recording.steps(range(6)):
            memory[: 4 * step + 4] = step + 1
            recording.log(loss=descend(optimizer, (model(wrapped[rows]) - 1).square().mean()))
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_allocated_memory_that_no_operation_writes_is_kept_as_a_step_reads_it(tmp_path):
    """NumPy writes the weights, and torch the lengths of the sequences, without its dispatcher."""
    lengths = torch.tensor([4, 3, 1])

    def loss_of(model, batch, number):
        x, y = batch
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        padded, count = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        means, weights = torch.empty(3, 4), torch.empty(3)
        weights.numpy()[:] = np.random.default_rng(0).random(3)
        for row in range(3):
            means[row] = padded[row].sum(0) / count[row]
        noise = torch.rand_like(torch.empty(3, 4))  # nothing reads this memory
        return (functional.cross_entropy(model(means + noise), y, reduction="none") * weights).mean()

    def make():
        model = nn.Linear(4, 3)
        batches = [(torch.randn(3, 4, 4), torch.randint(0, 3, (3,))) for _ in range(9)]
        return model, torch.optim.SGD(model.parameters(), lr=0.1), batches, loss_of

    run = recorded_as_it_is(tmp_path / "run", make)
    assert run.losses["loss"].to_list() == [step.loss for step in run]
    kinds = [[*inputs_of(row.inputs, "a step").given] for row in run.repeats(1, 9)]
    assert all(sum(name.startswith("input/") for name in names) == 3 for names in kinds), kinds


@pytest.mark.parametrize("what", ["buffer", "targets", "result", "state"])
def test_what_numpy_writes_between_two_operations_of_a_step_is_kept(what, tmp_path, capsys):
    """Micro-batches in one array, targets that are smoothed late, a result, and what a step leaves."""
    rows = np.random.default_rng(0).random((6, 3, 5, 8), np.float32)

    def body(record):
        model, array = network(), np.zeros((5, 8), np.float32)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.from_numpy(array)
        data, losses = [(torch.from_numpy(each[0].copy()), torch.randn(5, 8)) for each in rows], []
        with record(model=model, optimizer=optimizer) as recording:
            for number, (given, y) in enumerate(recording.steps(data)):
                optimizer.zero_grad()
                out, aim = model(given), y
                if what == "targets":
                    y.numpy()[::2] *= 0.5
                if what == "result":
                    aim = out.detach() * 2
                    aim.numpy()[:2] = array[:2]
                loss = functional.mse_loss(out, aim)
                loss.backward()
                for micro in range(3) if what == "buffer" else ():
                    array[:] = rows[number, micro]
                    x.mul_(2.0)
                    functional.mse_loss(model(x), y).backward()
                if what == "state" and number % 2:
                    model[0].bias.grad.numpy()[:] = 0.1
                optimizer.step()
                if what == "state" and number % 3:
                    model[2].bias.detach().numpy()[:] += 0.1
                losses.append(loss.item())
                recording.log(loss=loss)
        return losses, model.state_dict()

    run, (losses, _) = as_alone(tmp_path / "run", body)
    assert [step.loss for step in run] == losses and all(step.is_exact for step in run)
    said = "NumPy, or other code that torch does not show, changes"
    assert f"{said} {'the batch' if what == 'targets' else 'a tensor'}" in capsys.readouterr().err


def test_what_numpy_makes_of_a_batch_is_kept_as_the_step_reads_it(capsys):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, targets = torch.randn(9, 8, 4), torch.randint(0, 3, (9, 8))
    before = data.clone()
    with everystep.record(model=model, optimizer=optimizer) as recording:
        # Each batch is a part of the data.
        for x, y in recording.steps(list(zip(data, targets, strict=True))):
            if recording.step_count % 3 != 1:
                x.numpy()[::2] -= model.weight.sum().item()
            recording.log(loss=descend(optimizer, functional.cross_entropy(model(x), y)))
    run = recording.run
    assert "changes the batch" in capsys.readouterr().err
    assert run.verify(processes=1, progress=False).is_exact
    assert [step.loss for step in run] == run.losses["loss"].to_list()
    assert torch.equal(torch.stack([step.batch.x for step in run]), before)
    # The change may depend on the parameters.
    with pytest.raises(everystep.RunError, match="in no part and no batch"):
        run.what_if(3, lr=[0.2], progress=False)


def by_record(model, optimizer, x, y):
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for _ in recording.steps(range(20)):
            recording.log(loss=descend(optimizer, (model(x) - y).square().mean()))


def by_model(model, optimizer, x, y):
    everystep.train(model, (x, y), loss=nn.MSELoss(), optimizer=optimizer, steps=20, progress=False)


def by_function(model, optimizer, x, y):
    def step(batch):
        return descend(optimizer, (model(x) - y).square().mean())

    parts = {"model": model, "optimizer": optimizer}
    everystep.train(step, range(20), parts=parts, steps=20, progress=False)


@pytest.mark.parametrize("train", [by_record, by_model, by_function])
def test_what_was_trained_is_freed_with_the_last_reference_to_it(small, train):
    """Not when Python next collects garbage: memory of a GPU would be missing until then."""
    model, x, y = small
    model = nn.Sequential(*model)  # the fixture keeps its own
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    gc.collect()
    gc.disable()
    try:
        train(model, optimizer, x, y)
        alive = [
            weakref.ref(each) for each in (model, optimizer, *optimizer.state[model[0].weight].values())
        ]
        del model, optimizer
        assert [each() for each in alive] == [None] * len(alive)
    finally:
        gc.enable()
