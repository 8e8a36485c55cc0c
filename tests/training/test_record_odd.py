"""Loops that do odd things: the same bits as without everystep, and steps that come back exactly."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from tests.training.by_hand import bits
from tests.training.loops import unrecorded
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional
from torch.nn.utils import prune

import everystep

ODD = {}
#: What torch itself warns of in such loops.
pytestmark = pytest.mark.filterwarnings("ignore")


def odd(function):
    ODD[function.__name__] = function
    return function


def network():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    pairs = (
        (torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)) for _ in "ab"
    )
    return [*pairs] * (count // 2)


def update(model, optimizer, x, y):
    loss = functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def trained(record, body, model=None, optimizer=None, given=None, **parts):
    """Run a loop around a body that is called with model, optimizer, x, y and the step's number."""
    model = model or network()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    with record(model=model, optimizer=optimizer, **parts) as recording:
        for number, (x, y) in enumerate(recording.steps(given or batches())):
            recording.log(loss=body(model, optimizer, x, y, number))
    return model


@odd
def a_checkpoint_with_dropout(record):
    def body(model, optimizer, x, y, number):
        h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=number % 2 == 0)
        loss = functional.mse_loss(h + 0 * x.sum(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return trained(record, lambda m, o, x, y, n: body(m, o, x.requires_grad_(), y, n))


@odd
def a_seed_that_is_set_in_every_step(record):
    def body(model, optimizer, x, y, number):
        noise = torch.randn_like(x)
        torch.manual_seed(number)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            x = x + torch.randn_like(x)
        torch.randn(3, generator=torch.default_generator)
        return update(model, optimizer, x + noise, y)

    return trained(record, body)


@odd
def torch_func(record):
    def body(model, optimizer, x, y, number):
        parameters = dict(model.named_parameters())
        model.eval()
        found = grad(lambda p: functional.mse_loss(functional_call(model, p, (x,)), y))(parameters)
        model.train()
        value, tangent = jvp(lambda w: (x @ w).pow(2).mean(), (y.new_ones(6),), (y.new_ones(6),))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter -= 0.01 * found[name] * tangent / value
        return update(model, optimizer, x, y)

    return trained(record, body)


@odd
def vmap_over_a_module(record):
    def body(model, optimizer, x, y, number):
        return update(model, optimizer, x + torch.func.vmap(model[0])(x).mean().detach(), y)

    return trained(record, body)


@odd
def a_batch_that_is_a_part_of_what_the_body_reads(record):
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    given = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    return trained(record, lambda m, o, a, b, n: update(m, o, a - x.mean(0), b + y[0]), given=given)


@odd
def a_buffer_that_is_a_part_of_what_the_body_reads(record):
    whole = torch.arange(12.0)
    model = network()
    model.register_buffer("first_half", whole[:6])
    return trained(record, lambda m, o, x, y, n: update(m, o, x + m.first_half + whole.mean(), y), model)


@odd
def a_batch_with_a_part_in_it(record):
    image = torch.randn(8, 6, requires_grad=True)
    model = network()
    optimizer = torch.optim.Adam([image], lr=0.1)
    with record(model=model, image=image, optimizer=optimizer) as recording:
        for _, y in batches():
            with recording.step((image, y)):
                recording.log(loss=update(model, optimizer, image, y))
    return model


@odd
def memory_that_numpy_changes(record):
    buffer = np.zeros((8, 6), np.float32)
    tensor = torch.from_numpy(buffer)

    def body(model, optimizer, x, y, number):
        buffer[number] = number
        return update(model, optimizer, x + tensor, y)

    return trained(record, body)


@odd
def updates_between_the_steps(record):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            with recording.step((x, y)):
                loss = functional.mse_loss(model(x), y)
                loss.backward()
                recording.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if number == 4:
                model.load_state_dict(best)
    return model


@odd
def steps_that_fail_and_are_left_out(record):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            with contextlib.suppress(RuntimeError), recording.step((x, y)):
                recording.log(loss=update(model, optimizer, x, y))
                if number % 3 == 2:
                    raise RuntimeError("of the loop's own")
    return model


@odd
def layers_that_come_and_go(record):
    model = network()

    def body(model, optimizer, x, y, number):
        if number == 3:
            model.append(nn.Linear(3, 3))
            optimizer.add_param_group({"params": model[-1].parameters()})
        if number == 5:
            prune.l1_unstructured(model[0], "weight", 0.3)
        return update(model, optimizer, x, y)

    return trained(record, body, model, torch.optim.SGD(model.parameters(), lr=0.1))


@odd
def an_evaluation_in_inference_mode(record):
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(6, 3))

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x[:, None], y[:, None])
        model.eval()
        with torch.inference_mode():
            mask = torch.zeros(8, 4, dtype=torch.bool)
            mask[:, 3] = True
            model[0](x[:, None].expand(-1, 4, -1), src_key_padding_mask=mask)
        model.train()
        return loss

    return trained(record, body, model)


@odd
def training_in_inference_mode(record):
    model = network()
    with torch.inference_mode(), record(model=model) as recording:
        for x, _ in recording.steps(batches()):
            recording.log(loss=model(x).sum())
    return model


@odd
def what_is_kept_of_inference_mode(record):
    kept = {}

    def body(model, optimizer, x, y, number):
        with torch.inference_mode():
            kept["best"] = model(x).mean(0)
        return update(model, optimizer, x, y)

    return trained(record, body, kept=kept)


@odd
def results_into_given_tensors(record):
    def body(model, optimizer, x, y, number):
        empty, full = torch.empty(0), torch.zeros(8, 6)
        torch.mul(x, 2, out=empty)
        torch.add(x, 1, out=full)
        return update(model, optimizer, x + empty + full, y)

    return trained(record, body)


@odd
def a_default_dtype_that_changes(record):
    def body(model, optimizer, x, y, number):
        torch.set_default_dtype(torch.float64 if number % 2 else torch.float32)
        try:
            noise = torch.rand(6) + torch.ones(6) + torch.full((6,), 0.5)
        finally:
            torch.set_default_dtype(torch.float32)
        return update(model, optimizer, x + noise.float(), y)

    return trained(record, body)


@odd
def hidden_state_that_is_carried(record):
    model, head = nn.LSTM(6, 8), nn.Linear(8, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()])
    hidden = None
    with record(model=model, head=head, optimizer=optimizer) as recording:
        for x, y in recording.steps(batches()):
            out, hidden = model(x, hidden)
            loss = functional.mse_loss(head(out), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hidden = tuple(each.detach() for each in hidden)
            recording.log(loss=loss)
    return model


@odd
def the_next_batch_by_hand(record):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model=model, optimizer=optimizer) as recording:
        given = iter(recording.steps(batches()))
        for _ in range(8):
            recording.log(loss=update(model, optimizer, *next(given)))
    return model


@odd
def a_zip_that_ends_first(record):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model=model, optimizer=optimizer) as recording:
        for (x, y), _ in zip(recording.steps(batches(20)), range(8), strict=False):
            recording.log(loss=update(model, optimizer, x, y))
    return model


@pytest.mark.parametrize("name", ODD)
def test_it_does_the_same_and_comes_back(name, tmp_path):
    def seeded(record):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return ODD[name](record)

    expected = seeded(unrecorded)
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    model = seeded(lambda **parts: everystep.record(run=tmp_path / name, **parts))
    assert [bits(t) for t in model.state_dict().values()] == [
        bits(t) for t in expected.state_dict().values()
    ]
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks
    run = everystep.open(tmp_path / name)
    found = run.verify(processes=1, progress=False)
    assert found.is_exact, found
    failed = name == "steps_that_fail_and_are_left_out"
    assert (len(run), run.status) == (6 if failed else 8, "finished")
    for number in (1, 4, len(run)):
        assert run[number].is_exact


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (lambda: torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.zeros(4, dtype=torch.uint16), "uint16"),
        (lambda: torch.zeros(4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "float32"),
        (lambda: torch.zeros(4, device="meta"), "float32"),
        (lambda: torch.eye(4).to_sparse(), "float32"),
    ],
)
def test_what_a_run_cannot_hold_of_a_batch_is_said_in_its_place(batch, kind, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for each in recording.steps([{"odd": batch(), "pair": batches()[0]}] * 3):
            recording.log(loss=update(model, optimizer, *each["pair"]))
    run = recording.run
    assert run.verify(processes=1, progress=False).is_exact
    assert run[2].batch.nested["odd"] == f"<Tensor of torch.{kind}>"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: nn.LazyLinear(3), "has no shape yet"),
        (lambda: nn.Linear(3, 3, device="meta"), "on the meta device"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex128), "is complex128"),
        (lambda: {"queue": torch.eye(3).to_sparse()}, "sparse or nested"),
    ],
)
def test_what_a_run_cannot_hold_of_the_parts_is_refused(part, message, tmp_path):
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    with (
        pytest.raises(everystep.UsageError, match=message),
        everystep.record(run=tmp_path / "run", model=part()),
    ):
        pass
    assert not (tmp_path / "run").exists()
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks


def test_a_step_without_a_program_is_a_problem_and_not_the_end_of_verifying(tmp_path, monkeypatch):
    from everystep.step.build import NotCapturableError
    from everystep.training import step_rows

    build = step_rows.build_path
    monkeypatch.setattr(
        step_rows, "build_path", lambda *given: (_ for _ in ()).throw(NotCapturableError("it is not"))
    )
    model = network()
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for number, (x, _) in enumerate(recording.steps(batches())):
            recording.log(loss=model(x[number % 2 :]).sum())
            if number:
                monkeypatch.setattr(step_rows, "build_path", build)
    found = recording.run.verify(processes=1, progress=False)
    assert not found.is_exact and "step 1 of run cannot be replayed: it did" in found.problems[0]


def test_steps_that_cannot_be_replayed_do_not_count_as_verified(tmp_path, everystep_command):
    model = network()
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for x, _ in recording.steps([(torch.full((8, 6), float(n)), n) for n in range(1, 31)]):
            recording.log(loss=model(x).sum())
    file = tmp_path / "run/batches/1.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run = everystep.open(tmp_path / "run")
    found = run.verify(progress=False)
    assert (found.steps, found.all_steps, sum(found.threads.values())) == (29, 30, 29)
    assert not found.is_exact and found.different_steps == 0
    code, out, _ = everystep_command("verify", run.directory)
    assert code == 1 and "1 of 30 could not be" in out and "29 of 30 bit-identical" in out
    data = json.loads(everystep_command("verify", run.directory, "--json")[1])
    assert (data["steps"], data["all_steps"]) == (29, 30)
    question = "max(activations['4']) > 1e9"
    assert run.when(question, progress=False).inexact == (30,)
    code, _, err = everystep_command("when", run.directory, question)
    assert code == 1 and "steps from 30 on are skipped, because they cannot be replayed" in err
    measured = run.measure("max(activations['4'])", name="most", progress=False)
    assert len(measured.values) == 29 and measured.left_out == (30,)
    with pytest.raises(everystep.RunError, match="step 30, or ends there"):
        run.when("nonfinite", progress=False)


def test_a_compiled_module_is_refused(tmp_path):
    model = network()
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(
            everystep.UsageError, match=r"model: is compiled \(torch\.compile\); pass the uncompiled"
        ),
        everystep.record(run=tmp_path / "one", model=compiled),
    ):
        pass
    with (
        pytest.raises(
            everystep.UsageError, match="uncompiled while everystep watches, with different results"
        ),
        everystep.record(run=tmp_path / "two", model=model) as recording,
    ):
        for x, _ in recording.steps(batches()):
            compiled(x)
    assert (len(recording.run), recording.run.status) == (0, "failed")


def test_a_compiled_function_is_said(tmp_path, capsys):
    model = network()
    compiled = torch.compile(functional.mse_loss, backend="eager")
    compiled(*batches()[0][:1] * 2)
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for x, y in recording.steps(batches()):
            recording.log(loss=compiled(model(x), y))
    assert capsys.readouterr().err.count("calls a torch.compile function") == 1
    assert recording.run.verify(processes=1, progress=False).is_exact


def test_a_step_of_more_operations_than_a_run_may_have_is_recorded_without_them(monkeypatch, capsys):
    monkeypatch.setattr("everystep.step.build.MOST_ENTRIES", 20)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for repeats in recording.steps([1, 30]):
            optimizer.zero_grad()
            loss = sum(model(torch.ones(2, 3)).square().mean() for _ in range(repeats))
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    assert "step 2 cannot be replayed without your code: it has" in capsys.readouterr().err
    assert len(recording.run.losses) == 2
    assert recording.run[1].gradients
    with pytest.raises(everystep.EverystepError, match="step 2"):
        recording.run[2].gradients  # noqa: B018


class Normalized(nn.Module):
    """Every layer of torch's that keeps more for backward than it returns."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)
        self.of_channels, self.of_groups = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.of_layers = nn.LayerNorm(4)

    def forward(self, x):
        h = functional.max_pool2d(self.of_groups(self.of_channels(self.first(x))), 2)
        h = functional.adaptive_max_pool2d(functional.dropout(h, 0.2), 2).flatten(2).transpose(1, 2)
        h = functional.scaled_dot_product_attention(*[self.of_layers(h)[:, None]] * 3)
        return self.last(h.flatten(1))


def test_a_step_that_turns_elsewhere_keeps_what_only_autograd_knows(tmp_path):
    torch.manual_seed(0)
    model = Normalized()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = [(torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))) for _ in range(12)]
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number, (x, y) in recording.steps(enumerate(data, 1)):
            loss = functional.cross_entropy(model(x), y)
            if number % 5 == 0:
                recording.log(size=loss.detach().abs().max().item())
            if number > 7:
                loss = loss + 0.1 * model.last.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    assert run.verify(progress=False).is_exact
    for number in (5, 8, 10):
        for seen in run[number].operations:
            assert not [name for name in seen.inputs if name.startswith("input")], seen
    found = run.rerun(precision="float64", progress=False)
    assert len(found.losses) == 12 and found.losses == pytest.approx(found.recorded, rel=1e-4)
