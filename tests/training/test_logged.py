"""What loops log: numbers of any kind, none at all, and other ones when a step is taken again."""

import math
import re
from contextlib import suppress

import pytest
import torch
from tests.descent import descend
from tests.snapshots import take_snapshots_every
from torch import nn

import everystep


def loop(directory, body, steps=6, **settings):
    """Record a loop with a body of (model, optimizer, x, number) that returns what it logs."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.randn(4, 3) for _ in range(steps)]
    with everystep.record(run=directory, model=model, optimizer=optimizer, **settings) as recording:
        for number, x in recording.steps(enumerate(data, 1)):
            logged = body(model, optimizer, x, number)
            if logged:
                recording.log(**logged)
    return everystep.open(directory)


def update(model, optimizer, x):
    return descend(optimizer, model(x).pow(2).mean())


@pytest.mark.parametrize("number", [-0.0, torch.tensor(-0.0)])
def test_a_run_with_a_negative_zero_is_sound(number, tmp_path):
    def body(model, optimizer, x, _):
        update(model, optimizer, x)
        return {"loss": number, "metric": number}

    run = loop(tmp_path / "run", body)
    assert run.verify(progress=False).is_exact
    assert run.doctor().is_healthy
    assert set(run.measured("metric").values()) == {0.0}


def test_a_step_without_a_loss_is_not_a_step_with_a_loss_that_is_not_finite(tmp_path, capfd):
    def body(model, optimizer, x, number):
        loss = update(model, optimizer, x)
        return {"loss": loss} if number % 2 else {}

    run = loop(tmp_path / "run", body)
    assert "nan" not in capfd.readouterr().err
    assert run.facts.nonfinite_step is None
    assert run.verify(progress=False).is_exact
    with_nan = loop(tmp_path / "nan", lambda m, o, x, n: {"loss": update(m, o, x) * math.nan})
    assert with_nan.facts.nonfinite_step == 1


def test_a_loss_that_float32_would_round_is_kept(tmp_path):
    for number in (torch.tensor(2**24 + 1), 0.1):
        losses = torch.tensor(0.5), number
        run = loop(tmp_path / str(number), lambda m, o, x, n, of=losses: {"loss": of[n - 1]}, steps=2)
        assert run.losses["loss"].to_list() == [*map(float, losses)]
        assert run.verify(progress=False).is_exact


def test_a_complex_number_is_refused_for_what_it_is(tmp_path):
    with pytest.raises(everystep.UsageError, match=r"shape .* dtype complex64; log one real number"):
        loop(tmp_path / "run", lambda *_: {"loss": torch.tensor(1j)}, steps=1)


def test_a_discarded_step_is_not_the_first_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("everystep.training.writer.FLUSH_SECONDS", 0.0)
    model, found = nn.Linear(3, 2), []
    for bad, settings in ((2, {}), (5, {"resume": True})):
        with (
            suppress(ValueError),
            everystep.record(run=tmp_path / "run", model=model, **settings) as recording,
        ):
            for number in recording.steps(range(1, 7)):
                recording.log(loss=model.weight.sum() * (math.nan if number == bad else 1.0))
                if number == 2 == bad:
                    raise ValueError  # as many loops do
        found.append(recording.run.facts.nonfinite_step)
    assert found == [None, 5]
    assert recording.run.first_nonfinite(progress=False).step.number == 5


def test_a_dict_is_logged_as_its_items(tmp_path):
    def logs(directory, as_dict):
        model = nn.Linear(3, 1)
        with everystep.record(model=model, run=directory) as recording:
            for number in recording.steps(range(3)):
                values = {"loss": float(number), "square": number**2}
                recording.log(values) if as_dict else recording.log(**values)
        return recording.run.table_frame()

    assert logs(tmp_path / "one", True).equals(logs(tmp_path / "two", False))


def test_a_fork_logs_what_the_loop_has_logged(tmp_path):
    """One is changed later in the step, and one is logged again as a number of Python's."""
    model, state = nn.Linear(3, 1), {"total": torch.zeros(())}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(
        model=model, optimizer=optimizer, state=state, run=tmp_path / "run"
    ) as recording:
        for x in recording.steps(torch.randn(4, 5, 3)):
            loss = descend(optimizer, model(x).square().mean())
            state["total"].add_(loss.detach())
            recording.log(loss=loss, total=state["total"], again=loss, twice=loss * 2)
            state["total"].zero_()
            recording.log(again=7.0)
    run = recording.run
    fork = run.fork(0, lr=0.1, run=tmp_path / "fork", progress=False)
    assert fork.measured("twice") == run.measured("twice")
    assert {"total", "again"}.isdisjoint(fork.measurement_names)


def test_a_recording_without_a_loss_says_so(tmp_path, capfd):
    with everystep.record(model=nn.Linear(3, 1), run=tmp_path / "run") as recording:
        for _ in recording.steps(range(3)):
            pass
    assert "no loss was recorded; record it in each step" in capfd.readouterr().err
    assert recording.run.table_frame().columns == ["step"]
    assert not recording.run.plot().labels.caption
    assert "nan" not in recording.run._repr_html_()


def test_what_was_logged_is_kept_when_a_step_is_taken_again(tmp_path, capfd, monkeypatch):
    take_snapshots_every(monkeypatch, 8)

    def with_total(crash):
        total = 0.0

        def body(model, optimizer, x, number):
            nonlocal total
            loss = update(model, optimizer, x)
            total += loss.item()
            if number == crash:
                raise RuntimeError("stop")
            return {"loss": loss, "total": total}

        return body

    with pytest.raises(RuntimeError, match="stop"):
        loop(tmp_path / "run", with_total(30), 40, resume=True)
    before = everystep.open(tmp_path / "run").measured("total")
    assert len(before) == 29
    capfd.readouterr()
    run = loop(tmp_path / "run", with_total(None), 40, resume=True)
    after = run.measured("total")
    assert {step: after[step] for step in before} == before
    said = capfd.readouterr().err
    assert said.count("is repeated, total is") == 1 and "is kept" in said
    assert len(after) == 40 and run.doctor().is_healthy


def gradients_of(run):
    return [
        {name: tensor.clone() for name, tensor in run[t].gradients.items()}
        for t in range(1, len(run) + 1)
    ]


def of_model(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clipped", "by hand", "accumulated", "scaled"])
def test_gradients_are_those_that_backward_left(kind, tmp_path):
    expected = []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def body(model, optimizer, x, number):
        loss = model(x).pow(2).mean()
        if kind != "accumulated" or number % 3 == 1:
            model.zero_grad()
        (scaler.scale(loss) if kind == "scaled" else loss).backward()
        if kind == "scaled":
            scaler.unscale_(optimizer)
        expected.append(of_model(model))
        if kind in ("clipped", "scaled"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if kind == "by hand":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        elif kind == "scaled":
            scaler.step(optimizer)
            scaler.update()
        elif kind != "accumulated" or number % 3 == 0:
            optimizer.step()
        return {"loss": loss}

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.randn(4, 3) for _ in range(6)]
    parts = {"scaler": scaler} if kind == "scaled" else {}
    if kind != "by hand":
        parts["optimizer"] = optimizer
    with everystep.record(run=tmp_path / "run", model=model, **parts) as recording:
        for number, x in recording.steps(enumerate(data, 1)):
            recording.log(**body(model, optimizer, x, number))
    run = everystep.open(tmp_path / "run")
    found = gradients_of(run)
    assert [each.keys() for each in found] == [each.keys() for each in expected]
    for one, other in zip(found, expected, strict=True):
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor)
    if kind == "accumulated":
        assert [run[t].dropped.keys() for t in (1, 2, 3)] == [set()] * 3
        assert run[4].dropped.keys() == {"weight", "bias"}
        known = run[2].rows.gradients["weight"]
        assert known.rest == pytest.approx(float(expected[0]["weight"].norm()), rel=1e-6)
        assert known.whole == pytest.approx(float(expected[1]["weight"].norm()), rel=1e-6)
    run.measure("norm(gradients['weight'])", name="size", progress=False)
    sizes = [float(each["weight"].norm()) for each in expected]
    assert list(run.measured("size").values()) == pytest.approx(sizes, rel=1e-6)


@pytest.mark.parametrize("sets_to_none", [False, True])
def test_each_optimizer_has_the_gradients_that_it_took(sets_to_none, tmp_path):
    torch.manual_seed(0)
    maker, judge = nn.Linear(3, 4), nn.Linear(4, 1)
    of_maker, of_judge = (torch.optim.Adam(each.parameters(), lr=0.01) for each in (maker, judge))
    expected = []
    parts = {"maker": maker, "judge": judge, "of_maker": of_maker, "of_judge": of_judge}
    batches = [(torch.randn(5, 3), torch.randn(5, 4)) for _ in range(4)]
    with everystep.record(run=tmp_path / "run", **parts) as recording:
        for z, x in recording.steps(batches):
            of_judge.zero_grad(set_to_none=sets_to_none)
            loss = nn.functional.softplus(judge(maker(z))).mean() - judge(x).mean()
            loss.backward()  # into the maker, too
            taken = {f"judge.{name}": tensor for name, tensor in of_model(judge).items()}
            of_judge.step()
            of_maker.zero_grad(set_to_none=sets_to_none)
            nn.functional.softplus(-judge(maker(z))).mean().backward()
            expected.append(taken | {f"maker.{n}": tensor for n, tensor in of_model(maker).items()})
            of_maker.step()
            recording.log(loss=loss)
    for one, other in zip(gradients_of(everystep.open(tmp_path / "run")), expected, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor)


@pytest.mark.parametrize(
    ("evaluate", "is_named"),
    [
        (lambda model, x, log: log(validation=model(x).mean()), True),
        (lambda model, x, log: log(validation=model(x).mean().item()), False),
        (lambda model, x, log: torch.multinomial(model(x).softmax(1), 1).tolist(), False),  # a rollout
        (lambda model, x, log: log(teacher=nn.Linear(3, 2)(x).mean()), False),
    ],
    ids=["logged", "read", "rollout", "another model"],
)
def test_an_evaluation_in_a_step_is_named_where_it_is_part_of_the_step(evaluate, is_named, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(run="runs/evaluated", model=model, optimizer=optimizer) as recording:
        for number, x in enumerate(recording.steps([torch.randn(4, 3) for _ in range(4)])):
            recording.log(loss=update(model, optimizer, x))
            if number % 2:
                with torch.no_grad():
                    evaluate(model.eval(), x, recording.log)
                model.train()
    named = re.search(r"step 2 evaluates .*test_logged.py:\d+\): 3 of its", capsys.readouterr().err)
    assert (named is not None) == is_named
    assert everystep.open("evaluated").verify(progress=False).is_exact


def test_the_rate_of_a_param_group_that_is_gone_ends(tmp_path):
    def body(model, optimizer, x, number):
        if number == 1:
            moved = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": [moved], "lr": 0.3})
        logged = {"loss": update(model, optimizer, x)}
        if number == 3:
            optimizer.param_groups.pop()
        return logged

    run = loop(tmp_path / "run", body)
    run = loop(tmp_path / "run", body, steps=8, resume=True)
    assert str(run.measured("lr[1]")) == "{1: 0.3, 4: nan}"
    assert run.verify(progress=False).is_exact


def test_the_rate_of_a_param_group_that_a_fork_has_not_ends_there(tmp_path):
    model, loss = nn.Linear(3, 2), nn.MSELoss()
    optimizer = torch.optim.SGD(
        [{"params": [each]} for each in model.parameters()], lr=0.1, momentum=0.9
    )
    halved = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    data = torch.randn(8, 3), torch.randn(8, 2)
    options = {"loss": loss, "steps": 6, "progress": False}
    parent = everystep.train(
        model, data, optimizer=optimizer, scheduler=halved, run=tmp_path / "parent", **options
    )
    other = nn.Linear(3, 2)
    adam = torch.optim.Adam(other.parameters(), lr=0.02)
    run = parent.fork(4, model=other, optimizer=adam, run=tmp_path / "fork", loss=loss, progress=False)
    assert str(run.measured("lr[1]")) == "{1: 0.1, 3: 0.05, 5: nan}"
    assert run.measurement_names == ["lr", "lr[1]"]
    assert run[6].hyperparameters == {"lr": 0.02}
