"""What is measured in hindsight is what a loop by hand would have measured; and what is not finite."""

import json
import math
import shutil
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from tests.descent import descend, files_of
from tests.sealing import sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import Made, bits, by_hand, by_train, new_training
from torch import Tensor, nn
from torch.optim import SGD, Adam

import everystep
from everystep.errors import ExpressionError, UsageError
from everystep.experiment.batches import Batches
from everystep.recording import lock
from everystep.recording.facts import MeasuredFacts, WriterFacts
from everystep.recording.texts import shortest

STEPS = 30
SIZE = "norm(gradients['0.weight'])"


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def normalized():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def train(change=lambda made: None, *, model=network, loss=None, optimizer=None, **options):
    made = new_training(model, loss, optimizer)
    with torch.no_grad():
        change(made)
    return by_train(made, **{"steps": STEPS, "batch_size": 6} | options)


@pytest.fixture
def snapshots_every_8(monkeypatch):
    take_snapshots_every(monkeypatch, 8)


# What is measured, against a loop by hand.


@dataclass
class Seen:
    """What a loop by hand sees of a step."""

    number: int
    x: Tensor
    y: Tensor
    before: dict[str, Tensor]
    activations: dict[str, Tensor]
    loss: float = math.nan
    gradients: dict[str, Tensor] | None = None
    after: dict[str, Tensor] | None = None


def watched(made: Made, **options) -> list[Seen]:
    """Train by hand; return what was there in each step."""
    seen: list[Seen] = []
    model = made.model
    batches = Batches(len(made.x), options.get("batch_size"), torch.initial_seed())

    def copies():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def before(step):
        rows = batches.indices(step)
        x, y = (made.x, made.y) if rows is None else (made.x[rows], made.y[rows])
        seen.append(Seen(step, x, y, copies(), {}))

    def after(step):
        seen[-1].gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        seen[-1].after = copies()

    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda module, given, output, path=path: seen[-1].activations.update({path: output.detach()})
        )
    losses = by_hand(made, **options, before_step=before, after_step=after)
    for each, loss in zip(seen, losses, strict=True):
        each.loss = loss
    return seen


@pytest.fixture(scope="module")
def recorded_and_by_hand(tmp_path_factory):
    """A run that no test may change, and what a loop by hand sees of the same training."""
    with pytest.MonkeyPatch.context() as patch:
        take_snapshots_every(patch, 8)
        run = train(run=tmp_path_factory.mktemp("recorded") / "run")
    return run, watched(new_training(network), steps=STEPS, batch_size=6)


@pytest.fixture
def run(recorded_and_by_hand):
    """A copy of this run, for a test to change."""
    (recorded, _), place = recorded_and_by_hand, Path("runs/sequential-1")
    return everystep.open(shutil.copytree(recorded.directory, place))


EXPRESSIONS = {
    "loss": lambda now, before: now.loss,
    "2 * step": lambda now, before: 2.0 * now.number,
    SIZE: lambda now, before: now.gradients["0.weight"].norm().item(),
    "zeros(activations['1'])": lambda now, before: (now.activations["1"] == 0).double().mean().item(),
    "mean(activations['0'][0, :])": lambda now, before: now.activations["0"][0].mean().item(),
    "norm(updates['0.weight'])": lambda now, before: (
        (now.after["0.weight"] - now.before["0.weight"]).norm().item()
    ),
    "updates['0.bias'].after[2] / 3": lambda now, before: (now.after["0.bias"][2] / 3).item(),
    "updates['0.bias'].before[2]": lambda now, before: now.before["0.bias"][2].item(),
    "max(abs(parameters['0.weight']))": lambda now, before: now.before["0.weight"].abs().max().item(),
    "batch.x[1, 3] + sum(batch.y)": lambda now, before: (now.x[1, 3] + now.y.sum().item()).item(),
    "loss - previous.loss": lambda now, before: before and now.loss - before.loss,
    "norm(previous.gradients['0.bias'])": lambda now, before: (
        before and before.gradients["0.bias"].norm().item()
    ),
    "dot(gradients['0.weight'], previous.gradients['0.weight'])": lambda now, before: (
        before and (now.gradients["0.weight"] * before.gradients["0.weight"]).sum().item()
    ),
    "norm(previous.updates['0.weight'])": lambda now, before: (
        before and (before.after["0.weight"] - before.before["0.weight"]).norm().item()
    ),
    "sum(previous.batch.x) - sum(batch.x)": lambda now, before: (
        before and before.x.sum().item() - now.x.sum().item()
    ),
}
TRAININGS = {
    "momentum with dropout": {},
    "Adam": {"optimizer": partial(Adam, lr=0.01)},
    "batch norm": {"model": normalized},
    "eager": {"engine": "eager"},
}


@pytest.mark.usefixtures("snapshots_every_8")
@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("training", TRAININGS)
def test_measured_values_are_those_of_a_loop_by_hand(training):
    options = {"steps": STEPS, "batch_size": 6} | TRAININGS[training]
    model, optimizer = options.pop("model", network), options.pop("optimizer", None)
    run = by_train(new_training(model, None, optimizer), **options)
    options.pop("engine", None)
    seen = watched(new_training(model, None, optimizer), **options)
    expressions = dict(EXPRESSIONS)
    if place := [*TRAININGS].index(training):  # the first has all
        expressions = dict([*expressions.items()][place % 3 :: 3])
    if training == "batch norm":
        expressions["buffers['1.running_var'][3]"] = lambda now, before: now.before["1.running_var"][
            3
        ].item()
    for text, value in expressions.items():
        expected = {}
        for before, now in zip([None, *seen], seen, strict=False):
            found = value(now, before)
            if found is not None:
                expected[now.number] = found
        measured = run.measure(text, name=f"of {text}", progress=False)
        assert measured.values == expected, text
        assert measured.left_out == ()
        assert run.measured(f"of {text}") == expected
        assert len(expected) == STEPS - ("previous" in text)
    for number in (1, 2, 11, STEPS):
        step, now = run[number], seen[number - 1]
        assert step.is_exact and step.loss == now.loss
        assert bits_of(run.parameters(number - 1)) == bits_of(now.before)
        assert step.parameters.keys() == now.gradients.keys() == step.updates.keys()
        assert bits_of(step.parameters).items() <= bits_of(now.before).items()
        assert bits_of({n: u.before for n, u in step.updates.items()}) == bits_of(step.parameters)
        after = bits_of({n: u.after for n, u in step.updates.items()})
        assert after.items() <= bits_of(now.after).items()
        del now.activations[""]  # which is that of its last module
        assert bits_of(step.activations) == bits_of(now.activations)
        assert bits_of(step.dropped) == (bits_of(seen[number - 2].gradients) if number > 1 else {})
        assert bits_of(step.gradients) == bits_of(now.gradients)
        assert (bits(step.batch.x), bits(step.batch.y)) == (bits(now.x), bits(now.y))


def bits_of(tensors):
    return {name: bits(tensor) for name, tensor in tensors.items()}


def test_a_function_measures_as_an_expression_does(run):
    expected = run.measure(SIZE, progress=False).values
    for number, last in enumerate((torch.clone, torch.Tensor.item, torch.Tensor.numpy)):

        def size(step, last=last):
            return last(step.gradients["0.weight"].norm())

        assert run.measure(size, name=f"size {number}", progress=False).values == expected
        assert run.measured(f"size {number}") == expected and len(expected) == STEPS


def test_a_function_gives_its_name_and_none_leaves_a_step_out(run):
    def of_some_steps(step):
        return step.number if step.number in (3, 5) else None

    assert run.measure(of_some_steps, progress=False).name == "of_some_steps"
    assert run.measured("of_some_steps") == {3: 3, 5: 5}


def test_a_function_must_give_one_number(run):
    with pytest.raises(ExpressionError, match=r"one number, not a tensor of shape \(8, 4\)"):
        run.measure(lambda step: step.gradients["0.weight"], name="all", progress=False)
    with pytest.raises(ExpressionError, match="one number, not 'many'"):
        run.measure(lambda step: "many", name="all", progress=False)


def test_what_is_not_finite_is_measured_too():
    run = train(model=lambda: nn.Linear(4, 2), optimizer=partial(SGD, lr=1e20))
    values = run.measure("parameters['weight'][0, 0] * 1", name="weight", progress=False).values
    assert len(values) == STEPS and math.isnan(values[STEPS]) and math.isfinite(values[1])
    measured = run.measured("weight")
    assert repr(measured) == repr(values)


# Names, intervals, what is there already.


def test_a_previous_step_is_the_step_before_also_between_those_that_are_measured(run):
    text = "norm(previous.gradients['0.weight'])"
    own = run.measure(SIZE, progress=False).values
    assert run.measure(text, every=7, progress=False).values == {s: own[s - 1] for s in (7, 14, 21, 28)}
    fork = run.fork(9, lr=1e-3, progress=False)
    own = fork.measure(SIZE, progress=False).values
    found = fork.measure(text, progress=False).values  # step 10, too: step 9 is the parent's
    assert found == {step: own[step - 1] for step in range(2, len(fork) + 1)}


def test_measurements_are_part_of_the_run():
    made = new_training(network)
    run = by_train(made, steps=STEPS, validation=(made.x, made.y), evaluate_every=10)
    recorded = run.measurements
    values = run.measure(SIZE, name="size", every=4, progress=False).values
    opened = everystep.open(run.directory)
    assert "size" in opened.measurement_names
    own = opened.measurements.filter(pl.col("name") == "size")
    assert own.rows() == [("size", step, value) for step, value in values.items()]
    assert opened.measurements.filter(pl.col("name") != "size").equals(recorded)
    frame = opened.table_frame()
    assert frame["size"].to_list() == [values.get(step) for step in range(1, STEPS + 1)]
    assert frame["loss"].equals(run.losses["loss"])


def test_nothing_but_the_measurement_and_its_writer_is_changed(monkeypatch, run):
    losses, facts = run.losses, run.facts
    before = files_of(run.directory, "run.*")
    measuring = WriterFacts(process=7, host="there", since=facts.started + timedelta(days=1))
    monkeypatch.setattr(lock, "writer_here", lambda: measuring)
    run.measure(SIZE, name="size", every=10, progress=False)
    assert files_of(run.directory, "run.*") == before
    assert run.losses.equals(losses)
    changed = {"measured": {"size": MeasuredFacts(expression=SIZE, every=10)}, "writer": measuring}
    assert run.facts == facts.model_copy(update=changed)


def test_a_name_is_taken_by_something_else():
    made = new_training()
    run = by_train(made, steps=10, metrics={"mean": lambda prediction, target: prediction.mean()})
    recorded = run.measured("mean")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="already recorded 'mean' during training; choose another"):
            run.measure("loss", name="mean", overwrite=overwrite, progress=False)
    for name in ("loss", "step", "lr", "validation_loss"):
        with pytest.raises(UsageError, match=f"'{name}' is not allowed as the name"):
            run.measure("loss * 2", name=name, progress=False)
    run.measure("loss * 2", name="it", progress=False)
    with pytest.raises(UsageError, match=r"'it' of another expression \(loss \* 2\).*or overwrite it"):
        run.measure("loss * 3", name="it", progress=False)
    twice = {step: 2 * loss for step, loss in run.losses.rows()}
    assert run.measured("it") == twice
    assert run.measured("mean") == recorded and len(recorded) > 1


def test_overwriting_leaves_nothing_of_what_was_there(run):
    run.measure(SIZE, name="it", progress=False)
    run.measure("loss", name="it", every=10, overwrite=True, progress=False)
    assert run.measured("it") == {step: run.losses["loss"][step - 1] for step in (10, 20, 30)}
    assert run.measurement_names == ["it"]


def test_what_is_there_is_not_measured_again(run):
    asked = []

    def count(step):
        asked.append(step.number)
        return step.loss

    run.measure(count, every=10, progress=False)
    run.measure(count, every=5, progress=False)
    run.measure(count, every=5, progress=False)
    assert asked == [10, 20, 30, 5, 15, 25]
    assert list(run.measured("count")) == [5, 10, 15, 20, 25, 30]


@pytest.mark.usefixtures("snapshots_every_8")
def test_an_interrupted_measure_goes_on():
    run = train(steps=60)
    asked, stops_at = [], 45

    def loss_of(step):
        if step.number == stops_at:
            raise KeyboardInterrupt
        asked.append(step.number)
        return step.loss

    with pytest.raises(KeyboardInterrupt):
        run.measure(loss_of, progress=False)
    kept = max(step for step in run.snapshots if step < stops_at)
    assert kept > 0
    losses = dict(run.losses.rows())
    assert run.measured("loss_of") == {step: losses[step] for step in range(1, kept + 1)}
    asked.clear()
    stops_at = 0
    assert run.measure(loss_of, progress=False).values == losses
    assert asked == list(range(kept + 1, 61))
    assert run.measured("loss_of") == losses


def test_steps_that_are_not_as_recorded_are_left_out(run):
    sql(run.directory, "UPDATE steps SET loss = 1.5 WHERE step = 13")
    until = min(step for step in run.snapshots if step >= 13)
    measured = run.measure(SIZE, name="size", progress=False)
    assert measured.left_out == (13,)
    assert set(measured.values) == {*range(1, 13), *range(until + 1, STEPS + 1)}
    assert run.measured("size") == measured.values
    found = run.when(f"step >= 12 and {SIZE} > 0", "all", progress=False)
    assert found.inexact == (13,) and found.steps == (12, *range(until + 1, STEPS + 1))


def test_measuring_leaves_the_callers_generator_alone(run):
    before = torch.get_rng_state()
    run.measure(SIZE, progress=False)
    run.measure(lambda step: step.loss, name="it", progress=False)
    assert torch.equal(torch.get_rng_state(), before)


# Conditions.


@pytest.mark.parametrize(
    ("condition", "is_true"),
    [
        (f"{SIZE} > 0.5", lambda now, before: now.gradients["0.weight"].norm() > 0.5),
        (
            "zeros(activations['1']) > 0.5",
            lambda now, before: (now.activations["1"] == 0).double().mean() > 0.5,
        ),
        ("loss > 2 * previous.loss", lambda now, before: before and now.loss > 2 * before.loss),
        (
            f"{SIZE} > 2 * norm(previous.gradients['0.weight'])",
            lambda now, before: (
                before and now.gradients["0.weight"].norm() > 2 * before.gradients["0.weight"].norm()
            ),
        ),
        (lambda step: step.batch.x[0, 0] > 1, lambda now, before: now.x[0, 0] > 1),
        ("norm(parameters['0.bias']) < 0", lambda now, before: False),
    ],
    ids=lambda value: value if isinstance(value, str) else "by hand",
)
def test_when_finds_the_steps_of_a_loop_by_hand(recorded_and_by_hand, condition, is_true):
    run, seen = recorded_and_by_hand
    pairs = zip(seen, [None, *seen], strict=False)
    expected = tuple(now.number for now, before in pairs if is_true(now, before))
    assert len(expected) not in (1, STEPS)
    for which, steps in {"all": expected, "first": expected[:1], "last": expected[-1:]}.items():
        found = run.when(condition, which, progress=False)
        assert (found.steps, found.inexact) == (steps, ()), which


def test_a_number_that_a_loop_logs_under_the_name_of_a_rate_belongs_to_its_step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with everystep.record(weight=weight, optimizer=optimizer, run="logged") as recording:
        for number in recording.steps(range(6)):
            (weight * weight).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % 2:
                recording.log(**{"val.lr": 1.0})
    run = everystep.open("logged")
    assert run.when("measurements['val.lr'] > 0", "all", progress=False).steps == (2, 4, 6)
    assert run.when("lr > 0", "all", progress=False).steps == (1, 2, 3, 4, 5, 6)
    assert run[3].hyperparameters == {"lr": 0.1}


def test_conditions_on_recorded_columns_need_nothing_but_the_database():
    made = new_training(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.5))
    run = by_train(made, steps=STEPS, validation=(made.x, made.y), evaluate_every=5)
    run.measure(SIZE, name="size", every=3, progress=False)
    sizes, losses = run.measured("size"), dict(run.losses.rows())
    for path in ("programs", "snapshots"):
        shutil.rmtree(run.directory / path)
    opened = everystep.open(run.directory)

    def when(condition, which="all"):
        return opened.when(condition, which, progress=False).steps

    assert when("step > 27") == (28, 29, 30)
    assert when("lr < 0.02", "first") == (8,) and when("lr < 0.02", "last") == (30,)
    assert when("lr < previous.lr") == (8, 15, 22, 29)
    assert when("isnan(loss)") == ()
    low = sorted(losses.values())[9]
    assert when(f"loss <= {low!r}") == tuple(step for step, loss in losses.items() if loss <= low)
    assert when("loss > previous.loss") == tuple(
        step for step in range(2, STEPS + 1) if losses[step] > losses[step - 1]
    )
    limit = sorted(sizes.values())[4]
    expected = tuple(step for step, size in sizes.items() if size <= limit)
    assert when(f"size <= {limit!r}") == when(f"measurements['size'] <= {limit!r}") == expected
    assert len(expected) == 5
    validated = opened.measured("validation_loss")
    assert when("validation_loss > 0") == tuple(validated) == (5, 10, 15, 20, 25, 30)
    assert opened.measure("loss / 2", name="half", every=9, progress=False).values == {
        step: losses[step] / 2 for step in (9, 18, 27)
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("norm(gradients['9.weight'])", "did you mean 3.weight or 0.weight?"),
        ("size", "unknown name size"),
        ("norm(gradients['0.weight']", "was never closed"),
        ("activations['0']", "activations"),
        ("__import__('os')", ""),
    ],
)
def test_a_question_that_does_not_fit_is_refused_and_leaves_no_trace(text, said, recorded_and_by_hand):
    run, _ = recorded_and_by_hand
    for ask in (run.measure, run.when):
        with pytest.raises(ExpressionError) as refused:
            ask(text, progress=False)
        assert said in str(refused.value)
    assert run.measurement_names == []


# The commands.


def test_the_commands_measure_and_find(everystep_command, run):
    options = ("--name", "size", "--every", 4, "--processes", 1)
    code, out, err = everystep_command("measure", "sequential-1", SIZE, *options)
    values = run.measured("size")
    assert code == 0 and list(values) == list(range(4, STEPS + 1, 4))
    assert out.startswith("size: 7 values, from ") and "at step 4, " in out
    assert "everystep plot sequential-1 -m size" in err
    header = everystep_command("losses", "sequential-1", "--csv")[1].splitlines()[0]
    assert header == "step,loss,size"
    low = sorted(run.losses["loss"])[3]
    lines = [f"{step}\t{shortest(loss)}" for step, loss in run.losses.rows() if loss <= low]
    condition = f"loss <= {low!r}"
    assert everystep_command("when", "sequential-1", condition)[:2] == (0, f"{lines[0]}\n")
    assert everystep_command("when", "sequential-1", condition, "--last")[:2] == (0, f"{lines[-1]}\n")
    code, out, _ = everystep_command("when", "sequential-1", condition, "--all")
    assert (code, out.splitlines()) == (0, lines) and len(lines) == 4
    code, out, _ = everystep_command("when", "sequential-1", condition, "--all", "--json")
    steps = [{"step": step, "loss": loss} for step, loss in run.losses.rows() if loss <= low]
    assert json.loads(out) == {"run": "sequential-1", "count": 4, "steps": steps, "inexact": []}
    assert everystep_command("when", "sequential-1", "isnan(loss)") == (1, "", "no step matches\n")
    assert everystep_command("when", "sequential-1", "loss > 0", "--all", "--last")[0] == 2
    code, out, err = everystep_command("measure", "sequential-1", "loss", "--name", "size")
    assert (code, out) == (2, "") and "overwrite it" in err
    assert everystep_command("measure", "sequential-1", "loss", "--name", "size", "--overwrite")[0] == 0
    assert run.measured("size") == dict(run.losses.rows())


# The first cause of what is not finite.


def first_step_with(row):
    batches = Batches(20, 6, 0)
    return next(step for step in range(1, 5) if row in batches.indices(step).tolist())


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_function(function, width=8):
    return nn.Sequential(nn.Linear(4, 8), Function(function), nn.Linear(width, 2))


def is_finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize("engine", ["program", "eager"])
def test_an_overflow_names_the_operation(engine):
    made = new_training(lambda: nn.Linear(4, 2), optimizer=partial(SGD, lr=1e5))
    losses = by_hand(made, steps=12)
    first = next(step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss))
    run = train(
        model=lambda: nn.Linear(4, 2),
        optimizer=partial(SGD, lr=1e5),
        **{"batch_size": None, "steps": 12, "engine": engine},
    )
    found = run.first_nonfinite(progress=False)
    assert found.step.number == first > 2
    assert found.operation.operation.operator == "aten.mse_loss.default"
    assert found.operation.operation.phase == "loss"
    assert (found.name, found.nans, found.infinities, found.rows) == ("loss", 0, 1, ())
    assert is_finite(found.operation.inputs.values())
    for observed in found.step.operations[: found.index]:
        assert is_finite([*observed.inputs.values(), *observed.results.values()])


@pytest.mark.parametrize(
    ("function", "operator", "change", "row"),
    [
        (torch.exp, "aten.exp.default", lambda made: made.x[15].mul_(1000), 15),
        (lambda x: x / x, "aten.div.Tensor", lambda made: made.x[7].zero_(), 7),
    ],
    ids=["exp", "div"],
)
def test_an_operation_that_makes_it_is_named_with_the_row(function, operator, change, row):
    def without_bias(made):
        change(made)
        made.model[0].bias = None

    run = train(without_bias, model=partial(with_function, function))
    found = run.first_nonfinite(progress=False)
    assert found.step.number == first_step_with(row)
    operation = found.operation.operation
    assert (operation.operator, operation.module, operation.phase) == (operator, "1", "forward")
    assert found.rows == (row,)
    made = new_training(partial(with_function, function))
    with torch.no_grad():
        without_bias(made)
        made.model[0].load_state_dict({"weight": found.step.parameters["0.weight"]})
        by_hand = function(made.model[0](made.x[[row]]))
    assert found.nans == int(by_hand.isnan().sum()) and found.infinities == int(by_hand.isinf().sum())


@pytest.mark.parametrize(
    ("letter", "value", "counts"), [("x", math.nan, (1, 0)), ("y", -math.inf, (0, 1))]
)
def test_what_was_in_the_data_is_named_with_its_row(letter, value, counts):
    def put(made):
        getattr(made, letter)[13, 1] = value

    found = train(put).first_nonfinite(progress=False)
    assert found.step.number == first_step_with(13)
    assert found.operation is None and found.index is None
    assert (found.name, found.rows, (found.nans, found.infinities)) == (letter, (13,), counts)


def test_what_was_in_a_parameter_is_named():
    def put(made):
        made.model[3].weight[1, 2] = math.nan

    found = train(put).first_nonfinite(progress=False)
    assert (found.step.number, found.index, found.name, found.nans, found.rows) == (
        *(1, None, "3.weight", 1),
        (),
    )


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_makes_it_is_named(fused):
    def dead(made):
        made.model[0].bias[2] = -100.0

    adam = partial(Adam, lr=0.01, eps=0.0, fused=fused)
    found = train(dead, optimizer=adam, batch_size=None).first_nonfinite(progress=False)
    operation = found.operation.operation
    assert (found.step.number, operation.phase) == (1, "update")
    assert operation.operator == ("aten._fused_adam_.default" if fused else "aten.addcdiv_.default")
    assert (found.name, found.nans) == ("parameter/0.weight", 4)


@pytest.mark.parametrize(
    "options", [{"model": normalized}, {"optimizer": partial(Adam, lr=0.01), "engine": "eager"}]
)
def test_where_all_is_finite_nothing_is_found(options):
    assert train(**options).first_nonfinite(progress=False) is None


def masked(x, share):
    scores = x[:, :, None] * x[:, None, :]
    mask = torch.ones(8, 8).tril() if share else torch.zeros(8, 8)
    return scores.masked_fill(mask == 0, -math.inf).softmax(-1).sum(1)


def test_a_mask_is_no_finding_but_what_it_makes_of_a_row_without_anything_is():
    run = train(model=partial(with_function, partial(masked, share=True)))
    assert any(not is_finite(o.results.values()) for o in run[1].operations)
    assert run.first_nonfinite(progress=False) is None
    found = train(model=partial(with_function, partial(masked, share=False))).first_nonfinite(
        progress=False
    )
    assert found.step.number == 1
    assert found.operation.operation.operator == "aten._softmax.default"
    assert (found.nans, found.infinities) == (6 * 64, 0)
    assert ", no finite number" in found.to_text()


class Masked(nn.Module):
    """Its mask is a buffer of infinities; the logarithm becomes NaN after some steps."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        with torch.no_grad():
            self.last.bias.fill_(1.0)
            self.last.weight.mul_(0.1)

    def forward(self, x):
        hidden = self.first(x)
        weights = (hidden.unsqueeze(-1) * hidden.unsqueeze(-2) + self.mask).softmax(-1)
        return self.last((weights @ hidden.unsqueeze(-1)).squeeze(-1)).log()


def test_a_mask_that_is_a_buffer_hides_nothing():
    run = train(
        model=Masked,
        loss=lambda: lambda output, target: output.sum(),
        optimizer=partial(Adam, lr=0.05),
        **{"steps": 60, "batch_size": None},
    )
    found = run.first_nonfinite(progress=False)
    assert 1 < found.step.number == run.facts.nonfinite_step
    assert found.operation.operation.operator == "aten.log.default"


def test_statistics_that_overflow_are_named():
    def large(made):
        made.model[0].weight *= 1e22

    run = train(large, model=normalized, optimizer=partial(SGD, lr=1e-3))
    found = run.first_nonfinite(progress=False)
    assert math.isfinite(run.losses["loss"][-1])
    assert (found.step.number, found.name) == (1, "buffer/1.running_var")
    assert "native_batch_norm" in found.operation.operation.operator and found.why is not None


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x * 1e11)


@pytest.mark.parametrize("fused", [False, True])
def test_moments_that_overflow_are_named(fused):
    run = train(model=lambda: Scaled(4, 2), optimizer=partial(Adam, lr=1e-3, fused=fused))
    found = run.first_nonfinite(progress=False)
    assert math.isfinite(run.losses["loss"][-1])
    assert found.step.number == 1 and found.name.endswith("exp_avg_sq")


def test_the_command_names_the_cause(everystep_command):
    def put(made):
        made.x[13, 1] = math.nan

    train(put)
    step = first_step_with(13)
    code, out, _ = everystep_command("first-nonfinite", "sequential-1")
    assert code == 0
    assert out == f"step {step}: x of the batch has 1 NaN\n  row 13 of the data\n"
    code, out, _ = everystep_command("first-nonfinite", "sequential-1", "--json")
    found = json.loads(out)
    assert (found["step"], found["origin"], found["name"], found["nans"]) == (step, "batch", "x", 1)
    assert (found["rows"], found["rows_of"], found["operation"]) == ([13], "the data", None)
    train()
    code, out, _ = everystep_command("first-nonfinite", "sequential-2")
    assert (code, out) == (1, "all results of all operations are finite\n")


def _to_gradient(model, optimizer, number):
    model[0].weight.grad[1, 3] = number


def _to_parameter(model, optimizer, number):
    with torch.no_grad():
        model[0].weight[1, 3] = number


def _fill(model, optimizer, number):
    with torch.no_grad():
        model[0].weight[1].fill_(number)


def _to_moment(model, optimizer, number):
    optimizer.state[model[0].weight]["exp_avg"][1, 3] = number


def loop_that_writes(directory, *, within=None, between=None, number=math.nan):
    """Record a loop that writes a number into step 4, or between steps 4 and 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))
    optimizer = Adam(model.parameters(), lr=0.05)

    def batches():
        for step in range(1, 8):
            if step == 5 and between is not None:
                between(model, optimizer, number)
            yield torch.randn(8, 6), torch.randn(8, 2)

    with everystep.record(run=directory, model=model, optimizer=optimizer) as recording:
        for step, (x, y) in enumerate(recording.steps(batches()), 1):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if step == 4 and within is not None:
                within(model, optimizer, number)
            optimizer.step()
            recording.log(loss=loss)
    return everystep.open(directory)


def _nonfinite(everystep_command, run):
    return everystep_command("first-nonfinite", run.directory)[1]


@pytest.mark.parametrize(
    ("write", "number"), [(_to_gradient, math.inf), (_to_parameter, math.nan), (_fill, math.nan)]
)
def test_a_number_that_the_loop_writes_is_found_between_two_operations(
    write, number, tmp_path, everystep_command
):
    run = loop_that_writes(tmp_path / "run", within=write, number=number)
    found = run.first_nonfinite(progress=False)
    assert (found.step.number, found.origin, found.phase) == (4, "outside", "other")
    (before, after) = found.index - 1, found.index
    text = _nonfinite(everystep_command, run)
    assert f"gave it to the step between operations #{before} and #{after}" in text
    began = run.why(5, "parameters['0.weight'][1, 3]").began
    assert (began.number.step, began.rows) == (4, ())
    # `w[1, 3] = number` copies a tensor, and is a `fill_` with the number from torch 2.15 on.
    if found.operation.operation.name == "copy_":
        assert found.why.began.origin == began.origin == "outside"
        assert began.note == "passed to the step by your own code, not part of the batch"
    else:
        assert f"value={number})" in text
        assert began.formula == found.why.formula == str(number)


def test_a_learning_rate_that_is_not_finite_is_of_the_update():
    run = train(optimizer=partial(SGD, lr=math.inf))
    found = run.first_nonfinite(progress=False)
    assert (found.step.number, found.origin, found.phase) == (1, "operation", "update")


@pytest.mark.parametrize("write", [_to_parameter, _to_moment])
def test_a_number_that_is_written_between_two_steps_is_found_there(write, tmp_path, everystep_command):
    run = loop_that_writes(tmp_path / "run", between=write)
    found = run.first_nonfinite(progress=False)
    assert (found.step.number, found.origin, found.index) == (5, "between", None)
    assert "changed after step 4, outside of a step\n" in _nonfinite(everystep_command, run)


def test_a_question_that_fails_leaves_the_steps_as_they_are(run):
    before = run[3].loss
    with pytest.raises(ExpressionError, match="one number"):
        run.measure("gradients['0.weight'] if step > 4 else 0", name="some", processes=1, progress=False)
    again = run[4]
    assert again.is_exact
    assert run[3].loss == before
    assert again.loss == everystep.open(run.directory)[4].loss


def test_a_question_may_open_other_steps_of_the_run(run):
    question = lambda step: run[max(step.number - 1, 1)].loss  # noqa: E731
    found = run.measure(question, name="before", processes=1, progress=False)
    losses = run.losses["loss"].to_list()
    assert [*found.values.values()] == [losses[0], *losses[:-1]]


def test_a_layer_is_measured_in_the_steps_in_which_the_model_has_it(tmp_path):
    model = nn.ModuleDict({"stays": nn.Linear(3, 3), "leaves": nn.Linear(3, 3)})
    optimizer, sums, x = SGD(model.parameters(), lr=0.1), {"leaves": {}, "comes": {}}, torch.randn(4, 3)
    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "run") as recording:
        for step, batch in enumerate(recording.steps([x] * 6), start=1):
            for name in model.keys() - {"stays"}:
                sums[name][step] = model[name].weight.sum().item()
            if step == 3:
                del model["leaves"]
            if step == 4:
                model["comes"] = nn.Linear(3, 3)
                optimizer.add_param_group({"params": model["comes"].parameters()})
            loss = sum(layer(batch).pow(2).mean() for layer in model.values())
            recording.log(loss=loss)
            descend(optimizer, loss)
    run = everystep.open(tmp_path / "run")
    for name, known in sums.items():
        found = run.measure(f"sum(parameters['{name}.weight'])", name=name, progress=False)
        assert found.values == known
        after = f"sum(previous.updates['{name}.weight'].after)"
        found = run.measure(after, name=f"{name} after", progress=False)
        assert found.values == {step: value for step, value in known.items() if step - 1 in known}
    assert [step for step in range(1, 7) if "leaves.weight" in run[step].updates] == [1, 2]
