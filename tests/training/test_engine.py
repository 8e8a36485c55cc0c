"""Training by program gives the very bits of a loop written out by hand, and reports what ran the steps.

Every loss and snapshot comes back from disk.
"""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import (
    Made,
    assert_eager,
    assert_python,
    bits,
    by_hand,
    by_train,
    contents,
    is_of_torch,
)
from tests.training.engine_cases import CASES, OPTIMIZERS
from torch import nn
from torch.optim import lr_scheduler

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


@pytest.mark.sweep(every=4)
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


def test_the_chosen_cases_are_there():
    assert {case.name for case in CASES} >= WITH_THREADS


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


# Experiments: the same loop by hand, from their data, first parameters and generator as recorded.

LAYERS = {
    "two-layer": [nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10)],
    "diabetes": [nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1)],
    "wine": [nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3)],
    "digits": [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(512, 10),
    ],
}
LOSSES = {
    "two-layer": nn.MSELoss(reduction="sum"),
    "diabetes": nn.MSELoss(),
    "wine": nn.CrossEntropyLoss(),
    "digits": nn.CrossEntropyLoss(),
}
OPTIMIZER_OF = {
    "two-layer": partial(everystep.GradientDescent, lr=1e-4),
    "diabetes": partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2, fused=True),
    "wine": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "digits": partial(torch.optim.AdamW, lr=2e-3, fused=True),
}
BATCH_SIZES = {"two-layer": None, "diabetes": 32, "wine": 16, "digits": 64}
LENGTHS = {
    "two-layer": {"steps": 20},
    "diabetes": {"epochs": 2},
    "wine": {"epochs": 3},
    "digits": {"steps": 18},
}


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("engine", ["auto", "program", "eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_experiment_has_the_bits_of_the_loop(name, engine):
    settings = LENGTHS[name] | {"threads": 1, "engine": engine}
    run = everystep.train_experiment(name, settings, progress=False)
    assert (run.facts.training.engine.eager_from is None) == (engine != "eager")

    data = load_file(run.directory / "data.safetensors")
    model = nn.Sequential(*LAYERS[name])
    model.load_state_dict(run.parameters(0))
    torch.set_rng_state(run.state_near(0).rest["generator/torch"])
    optimizer = OPTIMIZER_OF[name](model.parameters())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 60) if name == "wine" else None
    made = Made(model, data["x"], data["y"], LOSSES[name], optimizer, scheduler)
    steps = len(run.losses)
    losses = by_hand(made, steps=steps, batch_size=BATCH_SIZES[name], scheduler_every="epoch")
    assert run.losses["loss"].to_list() == losses
    left = run.parameters(steps)
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in left.items()}
