"""What other code changes between two checks of a program, and mostly puts back before the next.

No check could find it. A change runs in a metric after step ON, what follows its `yield` after step OFF.
"""

import functools
from contextlib import contextmanager
from inspect import isgenerator

import pytest
import torch
from tests.descent import descend
from tests.training.by_hand import Changed, by_hand, by_train, contents, momentum, new_training
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as all_modules
from torch.nn.utils import prune
from torch.optim import optimizer as all_optimizers
from torch.overrides import TorchFunctionMode
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import everystep
from everystep.errors import EverystepError, TrainingError

#: Programs are checked at steps 8 and 16.
ON, OFF, STEPS = 10, 13, 18

CHANGES = {}
#: Changes that have begun, and may have to be ended.
OPEN = []


def close_changes():
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(autouse=True)
def nothing_stays_changed():
    yield
    close_changes()


def change(function=None, **parts):
    """Add a change to a training, which is made of these parts."""
    if function is None:
        return functools.partial(change, **parts)
    CHANGES[function.__name__] = function, parts
    return function


def changing(function, *, model=None, **parts):
    """Return a training with a metric that changes it."""
    made = new_training(model or with_everything, **parts)
    calls, begun = [0], []

    def metric(prediction, target):
        calls[0] += 1
        if calls[0] == ON and isgenerator(both := function(made)):
            begun.append(both)
            OPEN.append(both)
        if calls[0] in (ON, OFF) and begun:
            next(begun[0], None)
        return 0.0

    made.metrics = {"mine": metric}
    return made


def with_everything():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)
    )


@contextmanager
def having(owner, **attributes):
    """Give an object other attributes for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in attributes.items():
            patch.setattr(owner, name, value, raising=False)
        yield


@contextmanager
def holding(module, name, value):
    """Give a module another parameter or module for a while, which MonkeyPatch would not put back."""
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


@contextmanager
def removed(handle):
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()


# Modules of torch, and their parameters and buffers.


@change
def the_mode_of_the_model_for_good(made):
    made.model.eval()


@change
def the_statistics_of_a_batch_norm(made):
    made.model[1].momentum = None
    made.model[1].reset_running_stats()
    made.model[1].running_mean.fill_(0.5)
    made.model[1].eval()


@change
def memory_that_is_exchanged_and_comes_back(made):
    weight = made.model[0].weight
    old, weight.data = weight.data, weight.data * 0.9
    yield
    old.copy_(weight.data)
    weight.data = old


@change
def parameters_in_place(made):
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(0.5)


@change
def parameters_by_numpy(made):
    for parameter in made.model.parameters():
        parameter.detach().numpy()[...] *= 0.5


@change
def a_state_that_is_loaded_by_assignment(made):
    """The model has other parameters afterwards than its optimizer has."""
    state = {name: nn.Parameter(0.5 * p.detach()) for name, p in made.model.named_parameters()}
    made.model.load_state_dict(made.model.state_dict() | state, assign=True)


@change
def a_frozen_layer(made):
    made.model[0].requires_grad_(False)
    yield
    made.model[0].requires_grad_(True)


@change
def pruned_weights(made):
    prune.l1_unstructured(made.model[0], "weight", amount=0.5)
    yield
    prune.remove(made.model[0], "weight")


# Hooks.


def double_gradients(optimizer, *_):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(2)


HOOKS = {
    "forward": lambda m: m.model[4].register_forward_hook(lambda _, x, h: 2 * h),
    "a parameter": lambda m: m.model[0].weight.register_hook(lambda gradient: 2 * gradient),
    "all modules": lambda m: all_modules.register_module_forward_hook(
        lambda module, x, h: 2 * h if module is m.model else None
    ),
    "the optimizer": lambda m: m.optimizer.register_step_pre_hook(double_gradients),
    "all optimizers": lambda m: all_optimizers.register_optimizer_step_pre_hook(double_gradients),
}


def hooked(register):
    def hook(made):
        with removed(register(made)):
            yield

    return hook


CHANGES |= {f"a hook, {name}": (hooked(register), {}) for name, register in HOOKS.items()}


@change
def a_hook_on_a_node_that_a_graph_keeps(made):
    """Nothing of Python's holds the node itself."""
    with torch.enable_grad():
        graph = made.model[0].weight * 2
    factor = [2]
    graph.grad_fn.next_functions[0][0].register_prehook(lambda g: (g[0] * factor[0],))
    yield
    factor[0] = 1


# Attributes and functions that are exchanged.


def doubled_tanh(*given):
    return 2 * given[-1].tanh()


def doubled_step(self, closure=None, usual=torch.optim.SGD.step):
    double_gradients(self)
    return usual(self, closure)


PARTS = {
    "the class of a module": lambda m: having(m.model[3], __class__=nn.ReLU, inplace=False),
    "the p of a dropout": lambda m: having(m.model[2], p=0.4),
    "a module that is replaced": lambda m: holding(m.model, "3", nn.ReLU()),
    "a parameter that is replaced": lambda m: holding(
        m.model[5], "weight", nn.Parameter(torch.ones(2, 8))
    ),
}
EXCHANGED = {
    "the forward of a module": lambda m: having(m.model[3], forward=doubled_tanh),
    "the forward of torch's class": lambda m: having(nn.Tanh, forward=doubled_tanh),
    "a function of torch": lambda m: having(torch, tanh=doubled_tanh),
    "a functional of torch": lambda m: having(functional, linear=lambda x, w, b=None: x @ w.t() * 2),
    "the reduction of the loss": lambda m: having(m.loss, reduction="sum"),
    "the step of torch's optimizer": lambda m: having(torch.optim.SGD, step=doubled_step),
    "zero_grad of the optimizer": lambda m: having(m.optimizer, zero_grad=lambda set_to_none=True: None),
    "the class of the optimizer": lambda m: having(m.optimizer, __class__=Twice),
    "a mode for functions of torch": lambda m: Doubling(),
    "how saved tensors are kept": lambda m: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: 2 * t
    ),
}


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        super().step()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return 2 * found if function is torch.tanh else found


def exchanged(context):
    def exchange(made):
        with context(made):
            yield

    return exchange


CHANGES |= {name: (exchanged(context), {}) for name, context in (PARTS | EXCHANGED).items()}


@change
def automatic_casts(made):
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_cache_enabled(True)


@change(loss=lambda: functools.partial(functional.smooth_l1_loss, beta=1.0))
def an_argument_of_the_loss(made):
    made.loss.keywords["beta"] = 0.1
    yield
    made.loss.keywords["beta"] = 1.0


# The optimizer.


@change
def the_settings_of_the_optimizer(made):
    made.optimizer.param_groups[0] |= {"lr": 0.01, "momentum": 0.5}


@change
def a_tensor_as_lr(made):
    made.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


@change(optimizer=lambda parameters: momentum([*parameters][:-1]))
def a_group_that_is_added(made):
    made.optimizer.add_param_group({"params": [made.model[5].bias], "lr": 0.1})


@change
def a_state_that_the_optimizer_loads(made):
    made.optimizer.load_state_dict(made.optimizer.state_dict())
    made.optimizer.param_groups[0]["weight_decay"] = 0.3
    yield
    made.optimizer.param_groups[0]["weight_decay"] = 0.0


@change
def momentum_of_another_dtype(made):
    for entries in made.optimizer.state.values():
        entries["momentum_buffer"] = -entries["momentum_buffer"].double()
    yield
    for entries in made.optimizer.state.values():
        entries["momentum_buffer"] = entries["momentum_buffer"].float()


@change
def a_state_that_is_cleared(made):
    made.optimizer.state.clear()


adam = functools.partial(torch.optim.Adam, lr=0.01)


@change(optimizer=adam)
def counts_of_the_optimizer(made):
    for entries in made.optimizer.state.values():
        entries["step"].fill_(1.0)


@change
def memory_of_the_optimizer_and_gradients_turned(made):
    weight = made.model[4].weight
    entries = made.optimizer.state[weight]
    entries["momentum_buffer"], weight.grad = entries["momentum_buffer"].t(), weight.grad.t()


@change
def a_gradient_that_is_given(made):
    made.optimizer.zero_grad = lambda: None
    made.model[0].weight.grad = torch.ones(8, 4)
    yield
    del made.optimizer.zero_grad


# Data and generators.


@change
def the_data(made):
    made.x.mul_(1.1)


@change
def the_data_by_numpy(made):
    made.x.numpy()[0] = 1.0
    made.y.numpy()[1] = 1.0


@change
def the_seed(made):
    torch.manual_seed(3)


#: Python must run the step from there on: a training by a step that is vouched for may end there.
REFUSED = {
    *(f"a hook, {name}" for name in HOOKS),
    *EXCHANGED,
    *("a_hook_on_a_node_that_a_graph_keeps", "pruned_weights", "automatic_casts"),
    "a_gradient_that_is_given",
}
#: The loss is in no part, so nothing shows that it changes: the user vouches that it does not.
VOUCHED_FOR = {"the reduction of the loss", "an_argument_of_the_loss"}


def by_model(made):
    return by_train(made, steps=STEPS, evaluate_every=1, run="./run")


def by_step_function(made):
    """Train by a step that the user vouches for; what changes it runs before the next batch is given."""

    def step(batch):
        x, y = batch
        return descend(made.optimizer, made.loss(made.model(x), y))

    def batches():
        for number in range(STEPS):
            if number:
                made.metrics["mine"](None, made.y)
            yield made.x, made.y

    parts = {"model": made.model, "optimizer": made.optimizer}
    settings = {"engine": "program", "run": "run", "threads": 1, "progress": False}
    return everystep.train(step, batches(), parts=parts, steps=STEPS, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sweep(every=12)
@pytest.mark.parametrize(
    ("name", "train"),
    [
        *((name, by_model) for name in CHANGES),
        *((name, by_step_function) for name in CHANGES if name not in VOUCHED_FOR),
    ],
)
def test_a_change_between_two_checks_holds(name, train):
    function, parts = CHANGES[name]
    expected, unchanged = changing(function, **parts), changing(lambda made: None, **parts)
    losses = by_hand(expected, steps=STEPS, evaluate_every=1)
    assert losses != by_hand(unchanged, steps=STEPS, evaluate_every=1)  # or the case would show nothing
    made = changing(function, **parts)
    try:
        train(made)
        assert contents(made) == contents(expected)
    except TrainingError:
        assert train is by_step_function and name in REFUSED
        close_changes()  # which a replay in this process would find, too
    run = everystep.open("run")
    assert ON <= len(run) <= STEPS
    assert run.losses["loss"].to_list() == losses[: len(run)]
    # torch does not see what NumPy writes: where it is not among the recorded data, verify tells so.
    assert run.verify(processes=1, progress=False).is_exact or "numpy" in name


def test_an_error_of_a_metric_comes_through():
    def fail(made):
        raise ZeroDivisionError("in a metric")

    with pytest.raises(ZeroDivisionError, match="in a metric"):
        by_model(changing(fail))
    assert len(everystep.open("run")) == ON


def differs_or_same(make, engine="auto", **options):
    """Assert that a training has the bits of the loop, and return its run; None where it is refused."""
    expected = make()
    losses = by_hand(expected, steps=STEPS, **options)
    made = make()
    if not made.metrics:
        options.pop("evaluate_every", None)
    try:
        run = by_train(made, steps=STEPS, engine=engine, **options)
    except EverystepError:
        return None
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    return run


class Causal(nn.Module):
    """torch looks whether the mask is causal, and then takes another kernel."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(2, 1, 8, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(2))

    def forward(self, x):
        return self.inner(x.reshape(-1, 2, 2), mask=self.mask)[:, 1]


def test_a_number_that_python_reads_from_what_does_not_change_is_refused():
    made = new_training(Causal)
    with pytest.raises(everystep.TrainingError, match="reads a number from a tensor"):
        by_train(made, steps=STEPS, engine="program")


DATASETS = {
    "indices": (
        lambda x, y: Subset(TensorDataset(x, y), list(range(20))),
        lambda made: made.dataset.indices.reverse(),
    ),
    "tensors": (lambda x, y: ConcatDataset([TensorDataset(x, y)]), lambda made: made.x.mul_(2.0)),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_dataset_that_changes_is_refused(kind):
    wrap, function = DATASETS[kind]

    def make():
        made = changing(function)
        made.dataset = wrap(made.x, made.y)
        return made

    assert differs_or_same(make, evaluate_every=1, batch_size=8) is None


def test_a_forward_that_changes_its_batch_changes_that_of_its_step_alone():
    def make():
        made = new_training(lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 2)))
        made.dataset = TensorDataset(made.x.clone(), made.y.clone())
        return made

    run = differs_or_same(make)
    assert run is not None and run.verify(processes=1, progress=False).is_exact


# Gradients, which other code may read and keep.


def test_a_metric_may_keep_a_gradient():
    def make():
        made, kept = new_training(optimizer=functools.partial(torch.optim.Adam, lr=0.01)), []

        def metric(prediction, target):
            kept.append(made.model[0].weight.grad)
            total = sum(gradient.sum().item() for gradient in kept)
            made.optimizer.param_groups[0]["lr"] = 0.01 / (1 + abs(total))
            return 0.0

        made.metrics = {"mine": metric}
        return made

    assert differs_or_same(make, evaluate_every=5).facts.training.engine.reason is None


def test_gradients_are_clipped_together_with_those_of_a_group_that_came_later():
    def add(made):
        made.optimizer.add_param_group({"params": [*made.model.parameters()][:2]})

    def make():
        return changing(add, optimizer=lambda parameters: momentum([*parameters][2:]))

    assert differs_or_same(make, evaluate_every=1, max_grad_norm=0.1) is not None


# How often the user's code is called, and what it leaves.


def test_hooks_of_a_state_dict_are_not_called():
    def make():
        model = Changed(lambda m, h: h * (1 + 0.1 * len(m.log)))
        model.log = []
        model.register_state_dict_pre_hook(lambda *_: model.log.append(1))
        return model

    assert differs_or_same(lambda: new_training(make)) is not None


def test_losses_of_another_dtype_are_recorded_in_full():
    def loss(prediction, target):
        given = prediction if prediction.max().item() > 1.0 else prediction.double()
        return (given - target).square().mean()

    assert differs_or_same(lambda: new_training(loss=lambda: loss)) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.model[0].weight.data.mul_(0.9),
        lambda made: [own["momentum_buffer"].zero_() for own in made.optimizer.state.values()],
    ],
)
def test_what_a_metric_changes_after_the_last_step_is_recorded(change):
    made = new_training()

    def metric(prediction, target):
        change(made)
        return 0.0

    made.metrics = {"mine": metric}
    run = by_train(made, steps=20, evaluate_every=5)
    assert run.verify(progress=False, processes=1).is_exact
