"""Step functions that the user vouches for: the bits of the loop by hand, whatever changes between."""

import html
import json
import re

import pytest
import torch
from tests.descent import noting, seeded
from tests.training.by_hand import bits
from tests.training.step_functions import CASES, rows, usual
from torch import nn

import everystep
from everystep.errors import RunError, TrainingError
from everystep.program import memory
from everystep.step.stand_in import StandIn
from everystep.training import acceleration

STEPS = 40


def anew(make):
    seeded()
    return make()


def state_of(case):
    modules = [part for part in case.parts.values() if isinstance(part, nn.Module)]
    found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    found += [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    for part in case.parts.values():
        if isinstance(part, torch.optim.Optimizer):
            kept = [value for entries in part.state.values() for value in entries.values()]
            found += [value for value in kept if isinstance(value, torch.Tensor)]
    return list(map(bits, found)), torch.get_rng_state().tolist()


def number(result, name="loss"):
    value = result[name] if isinstance(result, dict) else result
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def by_hand(case, steps=STEPS):
    losses = []
    while True:
        for batch in case.batches() if callable(case.batches) else case.batches:
            losses.append(number(case.step(batch)))
            if len(losses) == steps:
                return losses


class Again:
    """Batches of a generator function, which can be iterated over again."""

    def __init__(self, make):
        self._make = make

    def __iter__(self):
        return self._make()


def trained(case, steps=STEPS, **others):
    batches = Again(case.batches) if callable(case.batches) else case.batches
    return everystep.train(case.step, batches, parts=case.parts, steps=steps, progress=False, **others)


def function_of(run):
    return run.facts.training.loop.function


def vouched(case, steps=STEPS, **others):
    return trained(case, steps, engine="program", **others)


def as_by_hand(name, train):
    """Train a case, and by hand: with the same bits, which replay. Return the run, and the case."""
    plain = anew(CASES[name])
    losses, state = by_hand(plain), state_of(plain)
    case = anew(CASES[name])
    run = train(case)
    assert list(run.losses["loss"]) == losses
    assert state_of(case) == state
    assert run.verify(progress=False, processes=1).is_exact
    return run, case


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", [name for name, make in CASES.items() if make().reason is None])
def test_it_is_the_loop_by_hand(name):
    run, case = as_by_hand(name, vouched)
    assert function_of(run).by_program >= case.least


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("name", [name for name, make in CASES.items() if make().reason])
def test_where_no_program_can_run_it_that_is_refused_and_python_does(name):
    case = anew(CASES[name])
    with pytest.raises(TrainingError, match=re.escape(case.reason)):
        vouched(case)
    assert function_of(as_by_hand(name, trained)[0]) is None


def test_what_is_logged_besides_is_kept():
    plain = anew(CASES["autoencoder"])
    expected = [plain.step(batch) for _ in range(5) for batch in plain.batches]
    run = vouched(anew(CASES["autoencoder"]), 20)
    assert function_of(run).by_program > 5
    for name in ("rebuilt", "divergence"):
        assert [*run.measured(name).values()] == [number(each, name) for each in expected]


def test_the_step_may_be_opened_as_any_other():
    run = vouched(anew(CASES["gan"]))
    step = run[33]
    assert step.batch is not None
    assert {"generator.0.weight", "critic.0.weight"} <= set(step.gradients)


def test_an_error_of_torch_leaves_the_steps_before_it():
    case = anew(CASES["tied_and_frozen"])
    wrong = [torch.full((8, 5), 99)]
    with pytest.raises(IndexError, match="out of range"):
        vouched(case._replace(batches=case.batches * 5 + wrong), run="./run")
    run = everystep.open("run")
    assert run.facts.status == "failed"
    assert len(run) == 20
    assert function_of(run).by_program > 10
    assert run.verify(progress=False, processes=1).is_exact


def changing(what, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), model=None, made=None):
    """Return a case in which `what(case, count)` runs before each batch is given."""
    made = made or usual(optimizer, model)
    loader = rows()
    count = [0]

    def batches():
        for batch in loader:
            count[0] += 1
            what(made, count[0])
            yield batch

    return made._replace(batches=batches)


def test_a_graph_that_the_loader_keeps_is_refused_as_by_hand():
    def what(case, count):
        model = case.parts["model"]
        if count == 12:
            case.parts["kept"].append((model[2].weight * model[0].weight.sum()).sum())
        elif count == 14:
            case.parts["kept"].pop().backward()

    made = anew(lambda: changing(what))
    made.parts["kept"] = []
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vouched(made._replace(parts=made.parts), run="./run")


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_python_runs_every_step_unless_the_user_vouches(engine):
    run = trained(anew(CASES["adam"]), 20, engine=engine)
    assert function_of(run) is None
    assert "by your own step" not in run._repr_html_()


def test_batches_of_ever_other_shapes_are_said_to_be_the_reason():
    case = anew(CASES["adam"])
    x, y = next(iter(case.batches))
    run = vouched(case._replace(batches=[(x[:n], y[:n]) for n in range(1, 7)]), 6)
    assert function_of(run).by_program == 0
    assert "there are 6 kinds of batches, and none came often enough" in run._repr_html_()


def test_a_summary_says_who_took_the_steps():
    run = vouched(anew(CASES["adam"]), 20)
    text = html.unescape(run._repr_html_())
    assert re.search(r"which you vouched for .*, ran 1\d of 20 steps, checked against Python \d", text)
    assert function_of(run).stands_behind == "vouched"


def test_programs_of_many_kinds_of_batches_share_a_limit_of_memory(monkeypatch):
    monkeypatch.setattr(acceleration, "MOST_BYTES", 0)
    let_go = []
    monkeypatch.setattr(StandIn, "let_go", noting(StandIn.let_go, let_go))
    run, case = as_by_hand("short_last_batch", vouched)
    assert len(let_go) > 5
    assert function_of(run).by_program >= case.least


def test_python_runs_the_steps_where_a_program_would_need_more_memory_than_is_free(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_LARGE", 1)
        patch.setattr(memory, "free_memory", lambda: 1000)
        little = everystep.train_experiment("two-layer", {"steps": 5}, run="little", progress=False)
    assert "from step 2 on: the program needs 0.0 GB of memory, but only" in capsys.readouterr().err
    usual_run = everystep.train_experiment("two-layer", {"steps": 5}, run="usual", progress=False)
    assert little.losses.equals(usual_run.losses)
    # A step is not opened either, although there is room for each of its results alone.
    storages = json.loads((usual_run.directory / "programs" / "2.json").read_text())["storages"]
    largest = max(each["bytes"] for each in storages.values() if each["kind"] == "temporary")
    monkeypatch.setattr(memory, "_LARGE", 1)
    monkeypatch.setattr(memory, "free_memory", lambda: largest)
    with pytest.raises(RunError, match=r"the program needs 0\.0 GB of memory"):
        everystep.open(usual_run.directory)[4]
