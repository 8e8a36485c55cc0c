"""Training by program gives the very bits of a loop written out by hand, and reports what ran the steps.

Every loss and snapshot comes back from disk.
"""

import pytest
import torch
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import (
    assert_eager,
    assert_python,
    assert_same,
    by_hand,
    by_train,
    contents,
    is_of_torch,
    new_training,
)
from tests.training.engine_cases import CASES, OPTIMIZERS

import everystep
from everystep.program.step_program import Program
from everystep.recording.files import program_file


def test_every_optimizer_of_torch_that_needs_no_closure_is_among_the_cases():
    kinds = {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    tried = {type(case.make().optimizer) for case in OPTIMIZERS}
    assert kinds - tried == {torch.optim.Optimizer, torch.optim.LBFGS}
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.sweep(every=8)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_has_the_bits_of_the_loop_and_every_step_comes_back(case, capfd, monkeypatch):
    take_snapshots_every(monkeypatch, 8)
    made = case.make()
    losses = by_hand(made, **case.options)
    expected = contents(made)
    made = case.make()
    run = by_train(made, **case.options)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == expected

    if not is_of_torch(run):
        assert_python(run, capfd)
    elif case.eager is not None:
        assert_eager(run, capfd, *case.eager)
    else:
        assert run.facts.training.engine.reason is None
        assert run.facts.training.engine.verified_to == case.steps
        assert capfd.readouterr().err == ""
    generator = torch.get_rng_state()
    run = everystep.open(run.directory)
    found = run.verify(processes=1, progress=False)
    assert found.is_exact, found
    assert (found.steps, found.snapshots) == (len(losses), len(run.snapshots) - 1)
    assert torch.equal(torch.get_rng_state(), generator)
    for number in run.facts.training.engine.programs:
        file = run.directory / program_file(number)
        assert Program.from_json(file.read_bytes()).torch == torch.__version__


#: Kernels that split their work by threads, at any size; and some that do not.
WITH_THREADS = {"max_grad_norm of batches", "convolutional in batches", "layer norm"}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in WITH_THREADS], ids=lambda case: case.name
)
def test_so_it_has_with_two_threads(case):
    options = case.options | {"steps": 10, "threads": 2}
    made = case.make()
    losses = by_hand(made, **options)
    expected = contents(made)
    made = case.make()
    run = by_train(made, **options)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == expected
    assert run.facts.training.engine.reason is None


def test_python_takes_the_steps_of_a_large_model_unless_programs_are_asked_for(monkeypatch, capfd):
    monkeypatch.setattr("everystep.training.stepper.MOST_STATE", 100)
    run = assert_same(new_training, 6)
    assert "the steps of a model of" in run.facts.training.engine.reason
    assert_python(run, capfd)
    asked = by_train(new_training(), engine="program", steps=10)
    assert asked.facts.training.engine.by_program
