"""Trainings without some rows, and with other targets: as a training by hand that never saw them."""

import json
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from loky import process_executor
from tests.descent import descend, looped, of_table
from tests.descent import trained as trained_by
from tests.snapshots import take_snapshots_every
from torch import nn

import everystep
from everystep.errors import ExperimentError, ExpressionError, RunError, UsageError
from everystep.experiment.batches import Batches
from everystep.replay import processes, what_if
from everystep.replay.processes import pool

ROWS, STEPS = 20, 14


ADAM = partial(torch.optim.Adam, lr=0.05)


def made(dropout=0.0, optimizer=ADAM):
    torch.manual_seed(3)
    x, y = torch.randn(ROWS, 4), torch.randint(0, 3, (ROWS,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return model, x, y, optimizer(model.parameters())


def by_hand(without=(), after=0, targets=None, batch_size=6, dropout=0.0, steps=STEPS, optimizer=ADAM):
    """The losses of a training that does not see some rows after a step, which may be one for each."""
    model, x, y, optimizer = made(dropout, optimizer)
    torch.manual_seed(5)
    order = Batches(ROWS, batch_size, seed=5)
    losses = []
    for step in range(1, steps + 1):
        if targets and step == after + 1:
            for row, target in targets.items():
                y[row] = target
        rows = order.indices(step)
        rows = range(ROWS) if rows is None else rows.tolist()
        since = without if isinstance(without, dict) else dict.fromkeys(without, after)
        rows = [row for row in rows if step <= since.get(row, STEPS)]
        loss = descend(optimizer, nn.functional.cross_entropy(model(x[rows]), y[rows]))
        losses.append(loss.item())
    return losses


def trained(directory, batch_size=6, dropout=0.0, optimizer=ADAM, **options):
    model, x, y, optimizer = made(dropout, optimizer)
    parts = {"loss": nn.CrossEntropyLoss(), "optimizer": optimizer, "run": directory}
    return trained_by(model, (x, y), steps=STEPS, batch_size=batch_size, seed=5, **parts, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that no test changes."""
    return trained(tmp_path_factory.mktemp("what-if") / "run")


@pytest.mark.sweep
def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    """A process, which needs the memory that a replay takes, answers all questions of two."""
    take_snapshots_every(monkeypatch, 4)
    run = trained(tmp_path / "run", dropout=0.5)
    rows = {"without_rows": range(12), "each": True, "progress": False}
    size = {"question": "norm(gradients['0.weight'])", "progress": False}
    monkeypatch.setattr(what_if, "GROUP", 3)
    alone = run.what_if(4, 11, **rows, processes=1), run.measure(**size, name="alone", processes=1)
    asked, threads = [], run.facts.training.numerics.threads
    with pool(1, threads, run.facts.training.numerics.environment()) as known:
        monkeypatch.setattr(
            processes, "pool", lambda *given: asked.append(given[:2]) or nullcontext(known)
        )
        shared = run.what_if(4, 11, **rows, processes=2), run.measure(**size, name="shared", processes=2)
        leak = known[0].submit(getattr, process_executor, "_MAX_MEMORY_LEAK_SIZE")
        assert leak.result() > 2**50
    assert asked == [(2, threads)] * 2
    assert (shared[0].cases, shared[0].recorded) == (alone[0].cases, alone[0].recorded)
    assert shared[1].values == alone[1].values == run.measured("shared") and len(run) == len(
        shared[1].values
    )


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("batch_size", [6, None])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_if_is_the_training_by_hand_without_the_rows(tmp_path, batch_size, dropout):
    run = trained(tmp_path / "run", batch_size, dropout)
    assert run.losses["loss"].to_list() == by_hand(batch_size=batch_size, dropout=dropout)
    found = run.what_if(4, 11, without_rows=[2, 7, 15], each=True, progress=False)
    assert found.recorded.losses == tuple(run.losses["loss"].to_list()[4:11])
    assert sorted(case.rows for case in found.cases) == [(2,), (7,), (15,)]
    for case in found.cases:
        hand = by_hand(case.rows, 4, batch_size=batch_size, dropout=dropout, steps=11)
        assert list(case.losses) == hand[4:]
        assert case.value == hand[-1]
    values = [case.value for case in found.cases]
    assert values == sorted(values)
    (together,) = run.what_if(4, 11, without_rows=[2, 7, 15], progress=False).cases
    hand = by_hand([2, 7, 15], 4, batch_size=batch_size, dropout=dropout, steps=11)
    assert list(together.losses) == hand[4:]


@pytest.mark.parametrize(
    ("optimizer", "at"),
    [(ADAM, 0), (partial(ADAM, fused=True), 1), (partial(torch.optim.SGD, lr=0.05, momentum=0.9), 0)],
)
def test_each_of_several_trainings_is_what_it_is_alone(tmp_path, optimizer, at):
    run = trained(tmp_path / "run", optimizer=optimizer)
    found = run.what_if(at, STEPS, without_rows=range(4), each=True, progress=False)
    assert len(found.cases) == 4
    for case in found.cases:
        assert list(case.losses) == by_hand(case.rows, at, optimizer=optimizer)[at:]


@pytest.mark.parametrize("batch_size", [6, None])
def test_a_fork_without_rows_is_the_training_by_hand_and_opens_again(tmp_path, batch_size):
    run = trained(tmp_path / "run", batch_size)
    fork = run.fork(
        4, steps=11, without_rows=[2, 7], relabel={3: 0, 9: 2}, run=tmp_path / "fork",
        progress=False,
    )  # fmt: skip
    hand = by_hand([2, 7], 4, {3: 0, 9: 2}, batch_size, steps=11)
    assert fork.losses["loss"].to_list() == hand
    opened = everystep.open(fork.directory)
    assert opened.verify(processes=1, progress=False).is_exact
    seen = [row for step in range(5, 12) for row in rows_of(opened[step])]
    assert 2 not in seen
    assert 3 in seen
    assert opened[5].batch.y.tolist() == [targets()[row] for row in rows_of(opened[5])]
    assert opened.facts.fork.changed["without_rows"] == [2, 7]
    assert opened.facts.fork.changed["relabel"] == ["3=0", "9=2"]


def rows_of(step):
    return step.batch.rows.tolist()


def targets():
    _, _, y, _ = made()
    return [{3: 0, 9: 2}.get(row, target) for row, target in enumerate(y.tolist())]


class Heavier:
    """A loss that grows with each call, which no state shows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, y):
        self.calls += 1
        return nn.functional.cross_entropy(out, y) * self.calls


@pytest.mark.parametrize("make", [Heavier, lambda: Heavier().__call__], ids=["object", "method"])
def test_what_a_loss_keeps_does_not_go_on_from_training_to_training(tmp_path, make):
    model, x, y, optimizer = made()
    run = trained_by(model, (x, y), loss=make(), optimizer=optimizer, steps=4, run=tmp_path / "run")
    model, *_, optimizer = made()
    opened = everystep.open(run.directory, model=model, loss=make(), optimizer=optimizer)
    with pytest.raises(
        RunError, match=r"cannot be replayed again, bit for bit.* keeps something that no"
    ):
        opened.what_if(0, without_rows=[2, 7], each=True, progress=False, processes=1)


def test_objects_that_hold_what_no_state_has_make_no_fork(tmp_path):
    model, x, y, optimizer = made()
    parts = {"loss": Heavier(), "optimizer": optimizer}
    run = trained_by(model, (x, y), **parts, steps=4, run=tmp_path / "run")
    with pytest.raises(RunError, match=r"the loss of step 1 differs .* pass them as they were before"):
        run.fork(0, lr=0.1, run=tmp_path / "fork", progress=False)
    assert not (tmp_path / "fork").exists()
    model, *_, optimizer = made()
    parts = {"model": model, "loss": Heavier(), "optimizer": optimizer}
    fork = everystep.open(run.directory).fork(0, **parts, run=tmp_path / "fork", progress=False)
    assert fork.losses["loss"].equals(run.losses["loss"])


def test_a_fork_without_the_rows_of_a_batch_before_it_resumes_without_them(tmp_path):
    run = trained(tmp_path / "run", batch_size=3)
    rows = rows_of(run[1])
    fork = run.fork(4, steps=12, without_rows=rows, run=tmp_path / "fork", progress=False)
    further = fork.resume(STEPS, progress=False)
    assert further.losses["loss"].to_list() == by_hand(rows, 4, batch_size=3)


def test_a_fork_of_a_fork_may_have_no_batch_with_the_rows_of_its_parent(tmp_path):
    run = trained(tmp_path / "run", batch_size=3)
    row = rows_of(run[12])[0]
    assert row not in {*rows_of(run[13]), *rows_of(run[14])}
    first = run.fork(4, without_rows=[row], run=tmp_path / "first", progress=False)
    second = first.fork(12, run=tmp_path / "second", progress=False)
    assert second.losses["loss"].to_list() == by_hand([row], 4, batch_size=3)
    asked = rows_of(run[13])[0]
    third = first.fork(12, without_rows=[asked], run=tmp_path / "third", progress=False)
    assert third.losses["loss"].to_list() == by_hand({row: 4, asked: 12}, batch_size=3)
    with pytest.raises(ExperimentError, match=f"no batch of steps 13 to 14 has {row}; step"):
        first.fork(12, without_rows=[row], run=tmp_path / "fourth", progress=False)


def test_it_ranks_by_an_expression(tmp_path, run):
    by = "norm(gradients['0.weight'])"
    found = run.what_if(4, 11, without_rows=[2, 7], each=True, by=by, progress=False)
    assert found.recorded.value == run[11].gradients["0.weight"].norm().item()
    for case in found.cases:
        fork = run.fork(
            4, steps=11, without_rows=case.rows, run=tmp_path / str(case.rows[0]), progress=False
        )
        assert case.value == fork[11].gradients["0.weight"].norm().item()
    text = found.to_text()
    assert f"trained again from state 4: {by} at step 11" in text


def test_an_experiment_is_trained_again_from_the_command_line(everystep_command):
    everystep_command("train", "wine", "--steps", 8, "--set", "batch_size=12", "--run", "./run", "-q")
    rows = everystep.open("run")[6].batch.rows.tolist()
    arguments = ["what-if", "run", "--at", 4, "--until", 8]
    code, out, _ = everystep_command(*arguments, "--without-rows-of", 6, "--each", "--json")
    assert code == 0
    answer = json.loads(out)
    assert sorted(case["rows"][0] for case in answer["cases"]) == sorted(rows)
    best = answer["cases"][0]
    fork = ["fork", "run", "--at", 4, "--until", 8, "--run", "./fork", "-q"]
    code, *_ = everystep_command(*fork, "--without-rows", best["rows"][0])
    assert code == 0
    assert everystep.open("fork").losses["loss"].to_list()[4:] == best["losses"]
    code, out, _ = everystep_command("what-if", "run", "--without-rows-of", 6, "--each", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["at"], answer["until"], len(answer["cases"])) == (5, 8, len(rows))
    code, out, _ = everystep_command(*arguments, "--without-rows", f"{rows[0]},{rows[1]}")
    assert code == 0
    assert f"{min(rows[:2])}, {max(rows[:2])}" in out


def test_it_starts_before_the_step_and_ends_with_the_run_unless_it_is_said(everystep_command, run):
    found = run.what_if(without_rows_of=6, each=True, progress=False)
    said = run.what_if(5, len(run), without_rows_of=6, each=True, progress=False)
    assert (found.at, found.until, found.cases) == (5, len(run), said.cases)
    assert run.what_if(without_rows_of=6 - len(run) - 1, each=True, progress=False).cases == said.cases
    with pytest.raises(UsageError, match="the step after which the trainings start"):
        run.what_if(without_rows=[2])
    for arguments, cure in (([], "pass one of these"), (["--without-rows", "2"], "no start: pass at")):
        code, _, err = everystep_command("what-if", run.directory, *arguments)
        assert code == 2
        assert cure in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without_rows": []}, "pass one of these: rows to leave out .*, lr, relabel"),
        ({"without_rows": [99]}, "there is no row 99; the training rows are 0 to 19"),
        ({"without_rows_of": 6}, "leaves no row in the batch of step 6"),
        (
            {"without_rows": [2], "by": "previous.loss"},
            "previous.loss is known of the recorded steps only",
        ),
        ({"without_rows": [2], "by": "gradients['9']"}, "unknown name"),
    ],
)
def test_what_cannot_be_left_out_is_refused(run, arguments, message):
    with pytest.raises((UsageError, ExpressionError), match=message):
        run.what_if(4, 11, progress=False, **arguments)


def test_rows_that_no_batch_has_and_targets_that_do_not_fit_are_named(tmp_path, run):
    row = run[12].batch.rows.tolist()[0]
    seen = {r for step in (5, 6) for r in rows_of(run[step])}
    missing = next(r for r in range(ROWS) if r not in seen)
    with pytest.raises(ExperimentError, match=f"no batch of steps 5 to 6 has {missing}"):
        run.fork(4, steps=6, without_rows=[missing], run=tmp_path / "a", progress=False)
    with pytest.raises(ExperimentError) as error:
        run.fork(4, relabel={row: 7, 99: 1, 1: 0.5}, run=tmp_path / "b", progress=False)
    for part in ("7 is not a class; they are 0 to 2", "there is no row 99", "0.5 is not a class"):
        assert part in str(error.value)
    assert not (tmp_path / "b").exists()


def test_a_training_that_needs_its_objects_or_its_loop_says_so(run):
    with pytest.raises(RunError, match=r"need the objects that trained run: everystep.open\(run, model"):
        everystep.open(run.directory).what_if(4, 11, without_rows=[2], progress=False)
    model, x, y, _ = made()
    loop = looped(
        model,
        [slice(0, 9), slice(9, 20)] * 2,
        lambda model, rows: nn.functional.cross_entropy(model(x[rows]), y[rows]),
    )
    with pytest.raises(RunError, match=r"leave the rows out in a fork .*everystep.record\(fork="):
        loop.what_if(1, 3, without_rows=[2], progress=False)


def test_a_training_across_a_resume_is_refused_with_the_step_to_start_at():
    resumed = everystep.train_experiment("two-layer", {"steps": 3}, progress=False).resume(
        5, progress=False
    )
    with pytest.raises(
        RunError, match=r"was forked or resumed after step 3, .* start at step 3 or later"
    ):
        resumed.what_if(1, lr=1e-5, progress=False)
    assert len(resumed.what_if(3, lr=1e-5, progress=False).recorded.losses) == 2


def test_a_metric_without_validation_rows_sees_the_other_targets(tmp_path):
    metrics = {"ones": lambda prediction, target: (target == 1).float().sum()}
    run = trained(tmp_path / "run", metrics=metrics)
    before = made()[2].tolist()
    changed = {row: 1 for row, target in enumerate(before) if target != 1}
    fork = run.fork(4, steps=11, relabel=changed, run=tmp_path / "fork", progress=False)
    assert list(run.measured("ones").values())[-1] == before.count(1)
    assert list(fork.measured("ones").values())[-1] == ROWS


def test_what_a_run_holds_is_not_read_where_it_came_from(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,b", *(f"{n % 7},{n % 5}" for n in range(20))]))
    experiment = of_table(table, "b", "Linear(1, 1)", steps=6, batch_size=5)
    run = everystep.train_experiment(experiment, run=tmp_path / "run", progress=False)
    found = run.what_if(1, 4, without_rows_of=2, each=True, progress=False)
    table.unlink()
    again = everystep.open(tmp_path / "run").what_if(1, 4, without_rows_of=2, each=True, progress=False)
    assert again.cases == found.cases and len(found.cases) == 5


def loop(rate=None, at=4, record=None, logs_item=False, optimizer=ADAM):
    """The losses of a loop with dropout, which may be recorded, at another rate after a step."""
    model, x, y, optimizer = made(0.3, optimizer)
    recording = everystep.record(run=record, model=model, optimizer=optimizer) if record else None
    losses = []
    with recording or nullcontext():
        batches = [slice(n % 4 * 5, n % 4 * 5 + 5) for n in range(STEPS)]
        for step, rows in enumerate(recording.steps(batches) if recording else batches):
            if step == at and rate is not None:
                optimizer.param_groups[0]["lr"] = rate
            loss = descend(optimizer, nn.functional.cross_entropy(model(x[rows]), y[rows]))
            losses.append(loss.item() if logs_item else loss.detach())
            if recording:
                recording.log(loss=loss)
    return [float(each) for each in losses]


@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, lr=1)])  # whole: no 0.5 fits
def test_a_loop_at_other_rates_is_the_loop_by_hand(tmp_path, everystep_command, optimizer):
    by_hand = partial(loop, optimizer=optimizer)
    recorded = by_hand(record=tmp_path / "loop")
    run = everystep.open(tmp_path / "loop")
    found = run.what_if(4, lr=[0.5, 0.001], by="norm(parameters['0.weight'])", progress=False)
    assert list(found.recorded.losses) == recorded[4:]
    assert sorted(case.lr for case in found.cases) == [0.001, 0.5]
    for case in found.cases:
        assert list(case.losses) == by_hand(case.lr)[4:]
    code, out, _ = everystep_command("what-if", run.directory, "--at", 4, "--lr", 0.5, "--json")
    (case,) = json.loads(out)["cases"]
    assert (code, case["lr"], case["value"]) == (0, 0.5, by_hand(0.5)[-1])
    # The name that the rate has in an experiment, as the help of the command shows it.
    given = "--set", "optimizer.lr=0.5", "--run", tmp_path / "fork", "--quiet"
    assert everystep_command("fork", run.directory, "--at", 4, *given)[0] == 0
    assert everystep.open(tmp_path / "fork").losses["loss"].to_list() == by_hand(0.5)


def test_changes_are_numbers_of_any_kind_and_nothing_else(tmp_path):
    loop(record=tmp_path / "loop")
    run = everystep.open(tmp_path / "loop")
    fork = run.fork(4, lr=np.float32(0.5), steps=np.int64(9), run=tmp_path / "fork", progress=False)
    (case,) = run.what_if(np.int64(4), 9, lr=torch.tensor(0.5), progress=False).cases
    assert fork.losses["loss"].to_list()[4:] == list(case.losses) == loop(0.5)[4:9]
    for wrong in (
        *({"relabel": {"a": 1}}, {"relabel": {3: "x"}}, {"relabel": [1, 2]}, {"lr": 10**400}),
        *({"without_rows": ["a"]}, {"without_rows": 3}, {"lr": 1, "steps": 5.5}, {"lr": 1, "steps": -3}),
    ):
        with pytest.raises(UsageError):
            run.fork(4, **wrong, run=tmp_path / "wrong", progress=False)
        if "steps" not in wrong:
            with pytest.raises(UsageError):
                run.what_if(4, **wrong, progress=False)
    with pytest.raises(UsageError, match=r"steps: must be an integer or None, not 5\.5"):
        run.resume(5.5)


def test_a_step_function_and_a_model_are_trained_at_another_rate_without_their_objects(tmp_path, run):
    model, x, y, optimizer = made(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    def step(batch):
        return descend(optimizer, nn.functional.cross_entropy(model(batch[0]), batch[1]))

    parts = {"model": model, "optimizer": optimizer}
    options = {"steps": 6, "run": tmp_path / "step", "progress": False}
    stepped = everystep.train(step, [(x, y)] * 6, parts=parts, **options)
    (case,) = everystep.open(stepped.directory).what_if(2, lr=0.5, progress=False).cases
    assert case.losses[0] == stepped.losses["loss"][2]  # an update at the rate comes after it
    assert set(case.losses[1:]).isdisjoint(stepped.losses["loss"])
    (case,) = everystep.open(run.directory).what_if(4, lr=0.5, progress=False).cases
    fork = run.fork(4, lr=0.5, run=tmp_path / "fork", progress=False)
    assert list(case.losses) == fork.losses["loss"].to_list()[4:]


def test_other_numbers_for_python_and_unknown_rates_are_reported(tmp_path, run):
    loop(record=tmp_path / "reads", logs_item=True)
    found = everystep.open(tmp_path / "reads").what_if(4, lr=0.5, progress=False)
    assert found.cases[0].differs_from == 6  # the first loss after an update at the rate
    loop(record=tmp_path / "no reads")
    unread = everystep.open(tmp_path / "no reads").what_if(4, lr=0.5, progress=False)
    assert unread.cases[0].differs_from is None  # that states differ is what was asked for
    assert "from step 6 on, Python could read different numbers" in found.to_text()
    assert (
        "your code passes to torch, stay as recorded, also where your code computes" in found.to_text()
    )
    assert (
        "stay as recorded" not in run.what_if(4, lr=0.5, progress=False).to_text()
    )  # they follow a rule
    for other in ({"without_rows": [2]}, {"relabel": {2: 1}}):
        with pytest.raises(UsageError, match="pass one of these: rows to leave out"):
            run.what_if(4, lr=0.5, **other, progress=False)
    for wrong in ({"relabel": [{2: 1}]}, {"without_rows": [1.5]}, {"without_rows": 3}, {"lr": "low"}):
        with pytest.raises(UsageError, match=r"pass rows as a list of whole numbers|must be a"):
            run.what_if(4, **wrong, progress=False)
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"lr is {rate:g}; pass learning rates from 0 on"):
            run.what_if(4, lr=[0.5, rate], progress=False)
    own = type("Own", (torch.optim.SGD,), {})
    loop(record=tmp_path / "own", optimizer=partial(own, lr=0.1))
    with pytest.raises(RunError, match="no learning rate that its programs know as a number"):
        everystep.open(tmp_path / "own").what_if(4, lr=0.5, progress=False)


def test_no_optimizer_keeps_the_recorded_rate_in_a_step(tmp_path):
    """In one step, a parameter gets other memory, so the programs have operations of the optimizer."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number, x in enumerate(recording.steps([torch.randn(4, 3) for _ in range(6)])):
            loss = model(x).pow(2).mean()
            loss.backward()
            if number == 4:
                model.weight.data = model.weight.data.clone()
            optimizer.step()
            optimizer.zero_grad()
            recording.log(loss=loss)
    run = everystep.open(tmp_path / "run")
    refused = r"step 5 of run has no .* for bias, weight: .*; end at step 4, or"
    for question in (run.what_if, partial(run.fork, run=tmp_path / "fork")):
        with pytest.raises(RunError, match=refused):
            question(1, lr=0.5, progress=False)
    assert run.what_if(1, 4, lr=0.5, progress=False).cases
    assert len(run.fork(1, lr=0.5, steps=4, run=tmp_path / "fork", progress=False)) == 4


class ByHand:
    """An update as many write it, by no class of torch."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = [*parameters], lr

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter.sub_(self.lr * parameter.grad)
            parameter.grad = None


def with_other_updates(record=None, rate=0.1, at=0, kind="both"):
    """The losses of a loop with updates by hand, or by an optimizer of torch and something more."""
    torch.manual_seed(0)
    model, other, average = (nn.Linear(4, 1) for _ in range(3))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    by_hand = ByHand([*model.parameters(), *([] if kind == "both" else other.parameters())], 0.1)
    parts = {"model": model, "other": other, "average": average, "optimizer": optimizer}
    recording = everystep.record(run=record, **parts) if record else None
    losses = []
    with recording or nullcontext():
        batches = torch.randn(6, 8, 4)
        for step, x in enumerate(recording.steps(batches) if recording else batches):
            optimizer.param_groups[0]["lr"] = rate if step >= at else 0.1
            loss = (model(x) - 1).square().mean() + (other(x) - 2).square().mean()
            if kind == "gradients":
                grads = torch.autograd.grad(loss, model.weight, retain_graph=True)
                model.weight.data -= 0.1 * grads[0]
            loss.backward()
            if kind in ("both", "all"):
                by_hand.step()
            if kind == "sharp":
                moves = [0.05 * parameter.grad for parameter in other.parameters()]
                optimizer.zero_grad()
                torch._foreach_add_([p.data for p in other.parameters()], moves)
                (other(x) - 2).square().mean().backward()
                torch._foreach_sub_([p.data for p in other.parameters()], moves)
            if kind != "all":
                optimizer.step()
            with torch.no_grad():
                if kind == "decay":
                    other.weight.mul_(1 - 0.5 * optimizer.param_groups[0]["lr"])
                if kind == "noise":
                    other.bias.data.add_(torch.ones(1), alpha=optimizer.param_groups[0]["lr"] ** 0.5)
                if kind == "decay by itself":
                    other.weight -= 0.5 * optimizer.param_groups[0]["lr"] * other.weight
                if kind == "decay to another":
                    other.weight.data = other.weight * (1 - 0.5 * optimizer.param_groups[0]["lr"])
                if kind == "scaled noise":
                    other.bias += torch.ones(1) * optimizer.param_groups[0]["lr"] ** 0.5
                least = 0.5 * optimizer.param_groups[0]["lr"]
                if kind == "shrinkage":
                    shrunk = torch.relu(other.weight.abs() - least)
                    other.weight.copy_(other.weight.sign() * shrunk)
                if kind == "shrinkage by torch":
                    other.weight.data = nn.functional.softshrink(other.weight, least)
                if kind == "threshold":
                    other.weight[other.weight.abs() < least] = 0.0
                if kind == "decay by a tensor":
                    other.weight.mul_(torch.tensor(1 - least))
                if kind == "decay by a power":
                    other.weight.mul_(torch.full((), -least).exp())
                other.weight.clamp_(-3, 3)
                for mean, own in zip(average.parameters(), other.parameters(), strict=True):
                    mean.lerp_(own, 0.1)
            optimizer.zero_grad()
            losses.append(loss.item() if not recording else 0.0)
            if recording:
                recording.log(loss=loss)
    return losses


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        *[("all", "bias, other.bias, other.weight"), ("both", "bias, weight"), ("gradients", "weight")],
        # The code may compute the number from the rate.
        *[("decay", "other.weight"), ("noise", "other.bias")],
        *[("decay by itself", "other.weight"), ("decay to another", "other.weight")],
        *[("scaled noise", "other.bias"), ("shrinkage", "other.weight")],
        *[("shrinkage by torch", "other.weight"), ("decay by a tensor", "other.weight")],
        *[("decay by a power", "other.weight"), ("threshold", "other.weight")],
    ],
)
def test_what_is_updated_by_hand_has_no_known_rate(tmp_path, kind, names):
    with_other_updates(tmp_path / "run", kind=kind)
    run = everystep.open(tmp_path / "run")
    for question in (run.what_if, partial(run.fork, run=tmp_path / "fork")):
        with pytest.raises(RunError, match=f"no learning rate that .* know as a number for {names}"):
            question(2, lr=0.5, progress=False)
    assert not (tmp_path / "fork").exists()


@pytest.mark.parametrize("kind", ["sharp", "average"])
def test_what_else_changes_the_parameters_of_an_optimizer_stays(tmp_path, kind):
    with_other_updates(tmp_path / "run", kind=kind)
    fork = everystep.open(tmp_path / "run").fork(2, lr=0.5, run=tmp_path / "fork", progress=False)
    assert fork.losses["loss"].to_list() == with_other_updates(rate=0.5, at=2, kind=kind)


def test_an_optimizer_with_a_rate_that_is_a_tensor_among_others_has_no_known_rate(tmp_path):
    one, other = nn.Linear(3, 2), nn.Linear(2, 1)
    rates = {"params": one.parameters()}, {"params": other.parameters(), "lr": torch.tensor(0.1)}
    model = nn.Sequential(one, other)
    run = looped(
        model,
        torch.ones(3, 4, 3),
        lambda m, x: m(x).square().mean(),
        optimizer=lambda _: torch.optim.SGD(rates, lr=0.1),
    )
    with pytest.raises(RunError, match="has no learning rate that its programs know as a number"):
        run.what_if(1, lr=0.5, progress=False)


def kept_outside(record=None, rate=0.1, at=0, kind="state", target=None):
    """The losses of a loop that carries something from step to step in no part."""
    torch.manual_seed(0)
    model, kept, losses = nn.Linear(4, 3), None, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(x, torch.arange(5) % 3) for x in torch.randn(8, 5, 4)]
    recording = everystep.record(run=record, model=model, optimizer=optimizer) if record else None
    with recording or nullcontext():
        for step, (x, y) in enumerate(recording.steps(batches) if recording else batches):
            if step >= at:
                optimizer.param_groups[0]["lr"] = rate
            if step == at and target is not None:
                y = y.clone()
                y[1] = target
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
            if kept is not None:
                loss = loss + (out - (kept(x) if kind == "teacher" else kept)).square().mean()
            if kind == "teacher" and step == 4:
                kept = deepcopy(model).requires_grad_(False)
            if kind == "state":  # begins with each fourth batch
                kept = None if step % 4 == 3 else out.detach() * 0.5
            losses.append(descend(optimizer, loss).detach())
            if recording:
                recording.log(loss=loss)
    return [float(each) for each in losses]


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(("kind", "at", "until"), [("state", 4, 6), ("teacher", 3, 7), ("state", 0, 2)])
@pytest.mark.parametrize("change", [{"lr": 0.9}, {"relabel": {1: 2}}])
def test_what_code_may_compute_from_other_parameters_is_refused(tmp_path, kind, at, until, change):
    recorded = kept_outside(tmp_path / "run", kind=kind)
    run = everystep.open(tmp_path / "run")
    by_hand = kept_outside(
        rate=change.get("lr", 0.1), at=at, kind=kind, target=change.get("relabel", {}).get(1)
    )
    assert recorded[:at] == by_hand[:at] and recorded[at + 1] != by_hand[at + 1]
    with pytest.raises(RunError, match=r"that (no step before has read|is in no batch) \(input"):
        run.what_if(at, until, **change, progress=False)
    # Before the first step that reads it, nothing is kept.
    (case,) = run.what_if(at, at + 1, **change, progress=False).cases
    assert list(case.losses) == by_hand[at : at + 1]


def drawing(record=None, rate=0.1, at=0, is_shuffled=False):
    """The losses of a loop that draws as many random numbers as its numbers need."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, losses = torch.randn(24, 4), []
    recording = everystep.record(run=record, model=model, optimizer=optimizer) if record else None

    def batches():
        for _ in range(2):
            yield from x[torch.randperm(24) if is_shuffled else torch.arange(24)].split(8)

    with recording or nullcontext():
        for step, rows in enumerate(recording.steps(batches()) if recording else batches()):
            optimizer.param_groups[0]["lr"] = rate if step >= at else 0.1
            drawn = torch._standard_gamma(model(rows).exp())
            loss = nn.functional.dropout(drawn, 0.2).square().mean()
            losses.append(descend(optimizer, loss).detach())
            if recording:
                recording.log(loss=loss)
    return [float(each) for each in losses]


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_draws_after_steps_that_draw_more_or_fewer_numbers_may_differ(tmp_path, is_shuffled):
    recorded = drawing(tmp_path / "run", is_shuffled=is_shuffled)
    (case,) = everystep.open(tmp_path / "run").what_if(1, lr=0.3, progress=False).cases
    by_hand = drawing(rate=0.3, at=1, is_shuffled=is_shuffled)
    assert list(case.losses[:2]) == by_hand[1:3] != recorded[1:3]
    assert (list(case.losses) == by_hand[1:]) != is_shuffled
    assert case.differs_from == (4 if is_shuffled else None)  # the order of the second epoch


def test_a_backward_pass_by_hand_has_no_known_rate(tmp_path):
    weight = torch.ones(2, 1)
    with everystep.record(run=tmp_path / "run", weight=weight) as recording:
        for x in recording.steps(torch.randn(3, 5, 2)):
            difference = x @ weight - 1
            weight -= 0.1 * x.T @ difference
            recording.log(loss=difference.square().sum())
    with pytest.raises(RunError, match="no learning rate that its programs know as a number: only"):
        recording.run.fork(1, lr=0.5, run=tmp_path / "fork", progress=False)


def test_other_sizes_than_recorded_end_a_training_with_a_sentence():
    """A mask picks as many rows as the parameters let it."""

    def loss_of(model, x):
        predicted = model(x)[:, 0]
        return predicted[predicted > 0].square().mean()

    torch.manual_seed(0)
    run = looped(nn.Linear(4, 1), torch.randn(6, 30, 4), loss_of)
    with pytest.raises(RunError, match=r"cannot be repeated with the change: .*operation") as refused:
        run.what_if(1, lr=5.0, progress=False)
    assert "; end at step 2, or fork the run instead: everystep.record(" in str(refused.value)
    assert run.what_if(1, 2, lr=5.0, progress=False).cases[0].losses == (run.losses["loss"][1],)


@torch.library.custom_op("everystep_tests::is_high", mutates_args=())
def is_high(weight: torch.Tensor) -> bool:
    return bool(weight.max() > 9)


#: What Python may read of a weight without a number that a program computes.
BRANCHES = {
    "equal": lambda weight: not torch.equal(weight > 9, torch.zeros(1, 2) > 9),
    "allclose": lambda weight: not torch.allclose(weight.clamp(min=9), torch.tensor(9.0)),
    "an operator": is_high,
    "numpy": lambda weight: weight.detach().numpy().max() > 9,
    "an array": lambda weight: np.asarray(weight.detach()).max() > 9,
    "tolist": lambda weight: max(*weight.tolist()[0]) > 9,
    "a count": lambda weight: len(torch.nonzero(weight > 9)) > 0,
    "a length": lambda weight: len(torch.bincount(weight[0].detach().abs().long())) > 9,
}


@pytest.mark.filterwarnings("ignore")  # nothing is known of an operator of one's own
@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("is_other", BRANCHES.values(), ids=[*BRANCHES])
def test_a_branch_on_what_no_program_computes_may_turn_at_another_rate(tmp_path, is_other):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for x in recording.steps(torch.ones(4, 3, 2)):
            loss = model(x).square().mean()
            x.numpy().sum(), x.tolist()  # of a batch, which stays the same
            if not is_other(model.weight):
                descend(optimizer, loss)
            recording.log(loss=loss)
    run = recording.run
    assert run.what_if(0, lr=0.5, progress=False).cases[0].differs_from == 1
    with pytest.raises(RunError, match=r"step 1 may differ .*: Python read 1 of its values"):
        run.fork(0, lr=0.5, run=tmp_path / "fork", progress=False)
    assert run.verify(processes=1, progress=False).is_exact


RELABELLED = {2: 1, 4: 0}


def batches_of(targets=None, at=4):
    """Batches of shuffled rows; after step `at`, some of the next batch have other targets."""
    _, x, y, _ = made()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step // 4)
        rows = torch.randperm(ROWS, generator=generator)[step % 4 * 5 :][:5]
        if targets and step == at:
            y = y.clone()
            y[rows[[*targets]]] = torch.tensor([*targets.values()])
        yield {"image": x[rows].clone(), "meta": (y[rows].clone(), step)}


def relabelled_loop(record=None, targets=None, as_function=False, loss_of=None, look=None):
    """The losses of a training with own targets, which may be recorded as a loop or a step function.

    look: given the state and the logged numbers of each step.
    """
    model, *_, optimizer = made(0.3)
    model = nn.Sequential(nn.BatchNorm1d(4), model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    losses = []

    def step(batch):
        x, y = batch["image"], batch["meta"][0]
        out = model(x)
        loss = loss_of(out, y) if loss_of else nn.functional.cross_entropy(out, y)
        descend(optimizer, loss)
        scheduler.step()
        losses.append(loss.detach())
        logged = {"loss": loss} | ({} if loss_of else {"hits": (out.argmax(1) == y).sum()})
        if look:
            look(model.state_dict(), logged)
        return logged

    if as_function:
        options = {"parts": parts, "steps": STEPS, "run": record, "progress": False}
        everystep.train(step, batches_of(targets), **options)
    elif record:
        with everystep.record(run=record, **parts) as recording:
            for batch in recording.steps(batches_of(targets)):
                recording.log(step(batch))
    else:
        [step(batch) for batch in batches_of(targets)]
    return [float(each) for each in losses]


@pytest.mark.parametrize("as_function", [False, True])
def test_other_targets_are_the_loop_by_hand_with_them(tmp_path, everystep_command, as_function):
    recorded = relabelled_loop(tmp_path / "run", as_function=as_function)
    run = everystep.open(tmp_path / "run")
    found = run.what_if(4, relabel=RELABELLED, by="norm(parameters['1.0.weight'])", progress=False)
    (case,) = found.cases
    assert list(found.recorded.losses) == recorded[4:]
    assert list(case.losses) == relabelled_loop(targets=RELABELLED)[4:] != recorded[4:]
    y = run[5].batch["meta.0"].tolist()
    assert case.targets == {row: (y[row], target) for row, target in RELABELLED.items()}
    rows = {tuple(run[5].batch["image"][row].tolist()) for row in RELABELLED}
    known = {n: {tuple(row) for row in run[n].batch["image"].tolist()} for n in range(5, STEPS + 1)}
    assert case.found_in == tuple(n for n, own in known.items() if rows & own)
    assert case.differs_from is None
    told = "--relabel", "2=1", "--relabel", "4=0"
    code, out, _ = everystep_command("what-if", run.directory, "--at", 4, *told)
    assert code == 0 and f"2: {y[2]} | 1, 4: {y[4]} | 0" in out
    assert "row: its place in the batch of step 5; found in step 5, " in out


@pytest.mark.parametrize("as_function", [False, True])
def test_a_fork_with_other_targets_is_the_loop_by_hand_with_them(
    tmp_path, everystep_command, as_function
):
    seen, stated = [], {}

    def look(state, logged):
        seen.append(logged["hits"].item())
        stated.update(state)

    relabelled_loop(tmp_path / "run", as_function=as_function)
    run = everystep.open(tmp_path / "run")
    options = "--at", 4, "--relabel", "2=1", "--relabel", "4=0", "--until", STEPS
    code, _, err = everystep_command("fork", run.directory, *options, "--run", tmp_path / "fork")
    assert code == 0 and "steps have a relabelled row in their batch" in err
    fork = everystep.open(tmp_path / "fork")
    assert fork.losses["loss"].to_list() == relabelled_loop(targets=RELABELLED, look=look)
    hits = fork.measurements.rows(named=True)
    assert [row["value"] for row in hits if row["name"] == "hits"] == seen
    assert fork.measured("lr") == run.measured("lr")
    assert all(torch.equal(fork.parameters(-1)[name], each) for name, each in stated.items())
    assert fork.facts.fork.changed == {"relabel": ["2=1", "4=0"]}
    assert fork.verify(processes=1, progress=False).is_exact
    assert fork[5].batch["meta.0"][[2, 4]].tolist() == [1, 0]
    different = run.diff(fork, progress=False).operation
    assert different.step == 5 and "of meta.0" in str(different.causes[0])
    assert (run.directory / "programs/1.json").samefile(fork.directory / "programs/1.json")
    for go_on in (fork.resume, partial(everystep.record, resume=fork.directory, model=nn.ReLU())):
        with pytest.raises(RunError, match="a loop cannot continue theirs; fork their parent"):
            go_on().__enter__()
    with pytest.raises(UsageError, match=f"no batches after step {STEPS}"):
        run.fork(4, relabel=RELABELLED, steps=STEPS + 1, progress=False)
    with pytest.raises(RunError, match=r"the shapes of its batches are part of its programs"):
        run.fork(4, without_rows=[2], progress=False)


def test_a_fork_ends_before_python_would_read_another_number(tmp_path):
    loop(record=tmp_path / "loop")
    options = {"lr": 0.5, "progress": False}
    fork = everystep.open(tmp_path / "loop").fork(4, **options, run=tmp_path / "fork")
    assert fork.losses["loss"].to_list() == loop(0.5) and fork.measured("lr") == {1: 0.05, 5: 0.5}
    loop(record=tmp_path / "reads", logs_item=True)
    reads = everystep.open(tmp_path / "reads")
    fork = reads.fork(4, **options, run=tmp_path / "ends")
    assert (fork.status, fork.losses["loss"].to_list()) == ("stopped", loop(0.5)[:5])
    assert fork.facts.reason.startswith("step 6 differs from the recording: operation #")
    assert fork.verify(processes=1, progress=False).is_exact
    relabelled_loop(tmp_path / "read", loss_of=lambda out, y: (out.sum(1) * y).mean() * y.sum().item())
    with pytest.raises(RunError, match=r"alone cannot fork it: step 5 may differ .*; fork it in your"):
        everystep.open(tmp_path / "read").fork(4, relabel={0: 9}, run=tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()


def test_a_loss_that_python_computes_is_not_known_after_a_change(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for x in recording.steps(torch.ones(2, 3).split(1) * 3):
            losses = [descend(optimizer, model(each).square().sum()) for each in (x, 2 * x)]
            recording.log(loss=sum(loss.item() for loss in losses))
    with pytest.raises(RunError, match=r"your code computes the loss of step 6 of run.*\(by, --by\)"):
        recording.run.what_if(2, lr=0.2, progress=False)
    by = "norm(gradients['weight'])"
    (case,) = recording.run.what_if(2, lr=0.2, by=by, progress=False).cases
    assert case.value > 0 and case.differs_from == 3  # of two updates, the first changes the second loss


def test_a_step_that_reads_targets_outside_torch_may_differ_with_others(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for rows in (*torch.arange(12).split(4), torch.arange(4, 8), torch.arange(4)):
            batch = {"x": x[rows], "y": y[rows]}
            with recording.step(batch):
                weight = 1 + sum(batch["y"].tolist()) / 10 if recording.step_count >= 3 else 1.0
                loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"]) * weight
                recording.log(loss=descend(optimizer, loss))
    relabel = {1: (int(y[1]) + 1) % 3}
    (case,) = recording.run.what_if(0, relabel=relabel, progress=False).cases
    assert case.found_in == (1, 5) and case.differs_from == 5  # step 4 reads other rows
    fork = recording.run.fork(0, relabel=relabel, run=tmp_path / "fork", progress=False)
    assert len(fork.losses) == 4 and "Python read y, which has another target" in fork.facts.reason


def test_other_targets_of_a_model_are_those_of_a_fork(tmp_path):
    run = trained(tmp_path / "run", dropout=0.2)
    row = run[5].batch.number(0)
    targets = {row: (run[5].batch.y[0].item() + 1) % 3}
    (case,) = run.what_if(4, relabel=targets, progress=False).cases
    fork = run.fork(4, relabel=targets, run=tmp_path / "fork", progress=False)
    assert list(case.losses) == fork.losses["loss"].to_list()[4:] != run.losses["loss"].to_list()[4:]


@pytest.mark.parametrize(
    ("loss_of", "targets", "message"),
    [
        (None, {5: 0, 2: 0.5}, r"relabel 5: the batch of step 5 has rows 0 to 4\n  relabel 2: 0.5 does"),
        (None, {2: 7}, "step 5 of run cannot be repeated with the change: Target 7 is out of bounds"),
        (lambda out, y: out.square().sum(), RELABELLED, r"no operation of step 5 of run reads meta\.0"),
        (
            lambda out, y: (out - torch.from_numpy(y.numpy() * 2.0)[:, None]).square().sum(),
            RELABELLED,
            r"the steps of run read a tensor that is in no batch \(input\): your code may make it",
        ),
    ],
)
def test_targets_that_programs_cannot_change_are_refused(tmp_path, loss_of, targets, message):
    relabelled_loop(tmp_path / "run", loss_of=loss_of)
    with pytest.raises((RunError, ExperimentError), match=message):
        everystep.open(tmp_path / "run").what_if(4, relabel=targets, progress=False)


def test_a_target_that_is_too_large_for_its_dtype_is_refused(tmp_path):
    model, x, y, _ = made()
    loss_of = lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square().mean()  # noqa: E731
    looped(model, [(x, y.half())] * 3, loss_of, run=tmp_path / "run")
    with pytest.raises(ExperimentError, match="relabel 2: 70000 is not finite in float16"):
        everystep.open(tmp_path / "run").what_if(1, relabel={2: 70000}, progress=False)


def test_batches_that_the_model_computes_are_not_those_of_another_rate(tmp_path):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def drawn():
        for _ in range(6):
            x = torch.randn(8, 4)
            yield x, model(x).argmax(1)

    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for x, y in recording.steps(drawn()):
            recording.log(loss=descend(optimizer, nn.functional.cross_entropy(model(x), y)))
    run = recording.run
    assert run.verify(processes=1, progress=False).is_exact
    with pytest.raises(RunError, match="a model that run trains computes its batches"):
        run.what_if(2, lr=0.5, progress=False)
    with pytest.raises(RunError, match="a model that run trains computes its batches"):
        run.fork(2, lr=0.5, run=tmp_path / "fork", progress=False)
