"""Training by program gives the very bits of a loop written out by hand, and says who took the steps."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tests.training.by_hand import Made, assert_eager, bits, by_hand, by_train, contents
from tests.training.engine_cases import CASES, OPTIMIZERS
from torch import nn
from torch.optim import lr_scheduler

import everystep
from everystep.experiment.batches import Batches
from everystep.program.execute import BoundProgram, allocate, without_autograd
from everystep.program.program import Program
from everystep.recording.snapshots import SnapshotPlan, read_snapshot


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


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_has_the_bits_of_the_loop(case, capfd):
    made = case.make()
    losses = by_hand(made, **case.options)
    expected = contents(made)
    made = case.make()
    run = by_train(made, **case.options)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == expected

    if case.eager is None:
        assert run.facts["engine"]["reason"] is None
        assert run.facts["engine"]["verified_to"] == case.steps
        assert capfd.readouterr().err == ""
    else:
        assert_eager(run, capfd, *case.eager)
    for rule in run.facts["engine"]["programs"]:
        assert Program.from_json((run.directory / rule["file"]).read_bytes()).torch == torch.__version__


#: Kernels that split their work by threads, at any size; and some that do not.
WITH_THREADS = {
    "GradientDescent",
    "clip_norm of batches",
    "convolutional in batches",
    "layer norm",
    "group norm",
}


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
    assert run.facts["engine"]["reason"] is None


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
    "two-layer": {"steps": 60},
    "diabetes": {"epochs": 6},
    "wine": {"epochs": 8},
    "digits": {"epochs": 1},
}


@pytest.mark.parametrize("engine", ["auto", "program", "eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_experiment_has_the_bits_of_the_loop(name, engine):
    settings = LENGTHS[name] | {"threads": 1, "engine": engine}
    run = everystep.train_experiment(name, settings, progress=False)
    assert (run.facts["engine"]["eager_from"] is None) == (engine != "eager")

    data = load_file(run.directory / "data.safetensors")
    model = nn.Sequential(*LAYERS[name])
    model.load_state_dict(run.parameters(0))
    torch.set_rng_state(read_snapshot(run.directory / "snapshots" / "000000")[1]["generator/torch"])
    optimizer = OPTIMIZER_OF[name](model.parameters())
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 60) if name == "wine" else None
    made = Made(model, data["x"], data["y"], LOSSES[name], optimizer, schedule)
    steps = len(run.losses)
    losses = by_hand(made, steps=steps, batch_size=BATCH_SIZES[name], schedule_every="epoch")
    assert run.losses["loss"].to_list() == losses
    left = run.parameters(steps)
    assert {n: bits(t) for n, t in model.state_dict().items()} == {n: bits(t) for n, t in left.items()}


# Replay: from what is on disk alone, without the user's model.

REPLAYED = {
    "GradientDescent",
    "SGD momentum",
    "SGD fused momentum",
    "SGD lr tensor",
    "AdamW fused",
    "Adam",
    "Adam fused two groups",
    "RMSprop",
    "StepLR",
    "StepLR of SGD",
    "StepLR of Adam with an lr tensor",
    "LambdaLR of two groups",
    "LambdaLR of fused groups",
    "SequentialLR",
    "short last batch",
    "clip_norm of batches",
    "x transposed",
    "y in x",
    "y in x in batches",
    "convolutional in batches",
    "dropout",
    "dropout in batches",
    "lstm two layers dropout",
    "causal transformer",
    "embedding max_norm",
    "tied",
    "outside the optimizer",
    "spectral_norm",
    "channels_last",
    "bfloat16",
    "flat AdamW",
    "memory",
    "noise",
    "cross entropy",
    "loss with parameters",
}


def test_the_chosen_cases_are_there():
    assert {case.name for case in CASES} >= REPLAYED | WITH_THREADS


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in REPLAYED], ids=lambda case: case.name
)
def test_every_loss_comes_back_from_disk(case, monkeypatch):
    monkeypatch.setattr(SnapshotPlan, "choose_interval", lambda plan, *_: setattr(plan, "interval", 16))
    run = by_train(case.make(), **case.options)
    losses = run.losses["loss"].to_list()
    first, *between, last = run.snapshots
    assert (first, last) == (0, 50)
    for start in (first, *between):
        torch.manual_seed(12345)
        assert Replay(run, start).losses() == losses[start:]


class Replay:
    """A run taken again from a snapshot by its programs: what replay needs, and nothing more."""

    def __init__(self, run, start):
        self.run, self.facts, self.start = run, run.facts, start
        self.device = torch.device(self.facts["device"])
        self.data = load_file(run.directory / "data.safetensors")
        batches = {name: self.facts["batches"][name] for name in ("batch_size", "seed", "drop_last")}
        self.batches = Batches(self.facts["data"]["rows"], **batches)
        parameters, rest, settings = read_snapshot(run.directory / "snapshots" / f"{start:06d}")
        # Which of the state_dict's are parameters, and which are buffers, programs know.
        self.state = {
            f"{kind}/{n}": t for n, t in parameters.items() for kind in ("parameter", "buffer")
        }
        self.state |= rest
        self.groups = settings["optimizer"]["groups"]
        self.rates = self._rates()
        self.shared = {}  # programs have the state in common
        self.optimizer = None
        self.programs = {}
        for rule in self.facts["engine"]["programs"]:
            bound = self._bound(run.directory / rule["file"])
            rows = bound.program.tensors["x"].shape[0]
            for when in ("first", "later") if rule["steps"] == "every" else (rule["steps"],):
                assert (when, rows) not in self.programs
                self.programs[when, rows] = bound

    def losses(self):
        losses = []
        torch.set_rng_state(self.state["generator/torch"])
        with everystep.numerics.in_force(self.facts["numerics"]["threads"]), without_autograd():
            for step in range(self.start + 1, self.facts["steps"] + 1):
                bound = self.programs["first" if step == 1 else "later", self.batches.rows_of(step)]
                rows = self.batches.indices(step)
                if rows is not None:
                    bound.tensor("x").copy_(self.data["x"][rows])
                    bound.tensor("y").copy_(self.data["y"][rows])
                self._put_rates(bound, step)
                bound.run()
                losses.append(bound.loss.item())
        return losses

    def _bound(self, path):
        program = Program.from_json(path.read_bytes())
        constants = path.with_suffix(".safetensors")
        values = self.state | (load_file(constants) if constants.exists() else {})
        if self.batches.batch_size is None:
            values |= self.data
        memory = allocate(program, values, self.device)
        for name in program.of_kind("state"):
            memory[name] = self.shared.setdefault(name, memory[name])
        bound = BoundProgram(program, memory, self.device, lambda: self._update(bound))
        return bound

    def _rates(self):
        """Return the lr of each group at each step: as the snapshot has it, then changes as recorded."""
        measured = self.run.measurements
        found = []
        for index, group in enumerate(self.groups):
            rates = {self.start: group.get("lr", self.state.get(f"group/{index}/lr"))}
            name = "lr" if index == 0 else f"lr[{index}]"
            changes = dict(measured.filter(measured["name"] == name)["step", "value"].iter_rows())
            for step in range(self.start + 1, self.facts["steps"] + 1):
                rates[step] = changes.get(step, rates[step - 1])
            found.append(rates)
        return found

    def _put_rates(self, bound, step):
        for name in bound.program.of_kind("hyperparameter"):
            _, group, setting, _ = name.split("/")
            assert setting == "lr"
            bound.tensor(name).fill_(self.rates[int(group)][step])
        self.now = [rates[step] for rates in self.rates]

    def _update(self, bound):
        """Take the step of an optimizer that is no list of operations."""
        if self.optimizer is None:
            names = [name for group in self.groups for name in group["params"]]
            self.parameters = {name: bound.tensor(f"parameter/{name}") for name in names}
            groups = [
                group | {"params": [self.parameters[name] for name in group["params"]]}
                for group in self.groups
            ]
            kind = getattr(torch.optim, bound.program.optimizer_step.name)
            self.optimizer = kind(groups, lr=self.now[0])
            for name, parameter in self.parameters.items():
                place = f"optimizer/{name}/"
                entries = {
                    n.removeprefix(place): t for n, t in self.state.items() if n.startswith(place)
                }
                if entries:
                    self.optimizer.state[parameter] = entries
        for group, rate in zip(self.optimizer.param_groups, self.now, strict=True):
            group["lr"] = rate
        for name, parameter in self.parameters.items():
            parameter.grad = bound.gradients.get(name)
        self.optimizer.step()
