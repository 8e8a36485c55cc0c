"""What a forward only reads, and other code sets between two steps.

Each setting gives a model and a function that sets it: to 2.0, or back to 1.0. Most cases set it back
before the next check of a program.
"""

import math

import torch
from tests.training.by_hand import mlp, new_training
from tests.training.python_cases.case import WHEN, Case, Network, Table, moments
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrize, prune
from torch.optim import lr_scheduler
from torch.optim import optimizer as all_optimizers

__all__ = ["CHANGERS", "SETTINGS", "SETTING_CASES", "set_between_steps"]

SETTINGS = setting = Table()


class Scaled(Network):
    scale = 1.0
    tensors = ()

    def forward(self, x):
        h = self.inner(x) * self.scale
        return h * self.tensors[0] if self.tensors else h


@setting
def an_attribute(_):
    model = Scaled()
    model.scale = 1.0
    return model, lambda value: setattr(model, "scale", value)


@setting
def a_closure(_):
    scale = 1.0

    class Closed(Network):
        def forward(self, x):
            return self.inner(x) * scale

    def change(value):
        nonlocal scale
        scale = value

    return Closed(), change


@setting
def the_numbers_of_a_tensor_of_a_list(_):
    model = Scaled()
    model.tensors = [torch.ones(2)]
    return model, lambda value: model.tensors[0].fill_(value)


# Functions and classes.


def single(h):
    return h * 1.0


def double(h):
    return h * 2.0


class Holding(Network):
    """Calls what it holds."""

    def __init__(self):
        super().__init__()
        self.function, self.functions = single, {"last": single}

    def forward(self, x):
        h = self.function(self.inner(x))
        for function in self.functions.values():
            h = function(h)
        return self.last(h)

    def usual(self, h):
        return h

    def doubled(self, h):
        return 2 * h

    last = usual


@setting
def a_function_that_is_held(_):
    model = Holding()
    return model, lambda value: setattr(model, "function", double if value == 2.0 else single)


@setting
def the_class_of_a_submodule(_):
    model = mlp()

    def change(value):
        model[1].__class__ = nn.ReLU if value == 2.0 else nn.Tanh
        model[1].inplace = False

    return model, change


# Modules of torch.


def attribute_of(model, module, name, usual, other):
    return model, lambda value: setattr(module, name, other if value == 2.0 else usual)


@setting
def the_p_of_a_dropout(_):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    return attribute_of(model, model[1], "p", 0.2, 0.4)


@setting
def the_mode_of_a_dropout(_):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    return model, lambda value: model[1].train(value == 1.0)


@setting
def the_mode_of_a_batch_norm(_):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, lambda value: model[1].train(value == 1.0)


@setting
def the_momentum_of_a_batch_norm(_):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    set_momentum = attribute_of(model, model[1], "momentum", 0.1, 0.5)[1]

    def change(value):
        set_momentum(value)
        model[1].eps = 1e-5 * value

    return model, change


@setting
def the_slope_of_an_activation(_):
    model = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 2))
    return attribute_of(model, model[1], "negative_slope", 0.1, 0.3)


@setting
def the_activation_of_an_encoder_layer(_):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 2))
    return attribute_of(model, layer, "activation", functional.relu, functional.gelu)


@setting
def a_bias_that_is_taken_away(_):
    model = mlp()
    bias = model[0].bias
    return attribute_of(model, model[0], "bias", bias, None)


@setting
def a_module_that_is_replaced(_):
    model = mlp()
    usual, other = model[1], nn.ReLU()
    return model, lambda value: model.__setitem__(1, other if value == 2.0 else usual)


@setting
def a_module_that_is_appended(_):
    model = mlp()
    return model, lambda value: model.append(nn.Tanh()) if value == 2.0 else model.pop(-1)


class Stack(Network):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) + 0.1 * number
        return self.inner(x)


@setting
def the_order_of_modules(_):
    model = Stack()
    first, second = model.layers

    def change(value):
        model.layers[0], model.layers[1] = (second, first) if value == 2.0 else (first, second)

    return model, change


@setting
def a_weight_that_is_tied_on_the_way(_):
    model = Stack()
    weight = model.layers[1].weight
    return attribute_of(model, model.layers[1], "weight", weight, model.layers[0].weight)


@setting
def a_parameter_that_is_replaced(_):
    model = mlp()
    usual, other = model[2].weight, nn.Parameter(torch.ones(2, 8))
    return attribute_of(model, model[2], "weight", usual, other)


@setting
def the_data_of_a_parameter(_):
    model = mlp()

    def change(value):
        model[2].weight.data = model[2].weight.data * value

    return model, change


@setting
def a_frozen_layer(_):
    model = mlp()
    return model, lambda value: model[0].requires_grad_(value == 1.0)


@setting
def a_parameter_in_place(_):
    model = mlp()

    def change(value):
        with torch.no_grad():
            model[0].weight.mul_(value)

    return model, change


# Tensors that are not parameters.


class WithABuffer(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(2))
        self.plain = torch.ones(2)
        self.mix = torch.tensor([[1.0, 0.5], [0.0, 1.0]])

    def forward(self, x):
        return (self.inner(x) * self.scale * self.plain) @ self.mix


@setting
def a_buffer_that_is_replaced(_):
    model = WithABuffer()
    return model, lambda value: setattr(model, "scale", torch.full((2,), value))


@setting
def a_tensor_seen_by_numpy(_):
    model = WithABuffer()
    model.view = model.plain.numpy()
    return model, lambda value: model.view.fill(value)


# Hooks that are added on the way.


def hooked(register):
    """Return what adds a hook, or removes it."""
    handles = []

    def change(value):
        if value == 2.0:
            handles.append(register())
        else:
            handles.pop().remove()

    return change


@setting
def a_forward_hook(_):
    model = mlp()
    return model, hooked(lambda: model[0].register_forward_hook(lambda m, x, h: 2 * h))


@setting
def a_backward_hook(_):
    model = mlp()
    return model, hooked(
        lambda: model[2].register_full_backward_pre_hook(lambda m, gradients: (2 * gradients[0],))
    )


@setting
def a_hook_of_a_parameter(_):
    model = mlp()
    return model, hooked(lambda: model[0].weight.register_hook(lambda gradient: 2 * gradient))


@setting
def a_hook_after_accumulation(_):
    model = mlp()

    def doubles(parameter):
        parameter.grad = 2 * parameter.grad

    return model, hooked(lambda: model[0].weight.register_post_accumulate_grad_hook(doubles))


@setting
def a_hook_of_a_gradient_accumulator(_):
    model = mlp()
    weight = model[0].weight
    model.accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
    return model, hooked(
        lambda: model.accumulator.register_prehook(lambda gradients: (2 * gradients[0],))
    )


@setting
def a_hook_on_a_node_that_a_graph_keeps(_):
    """Nothing of Python's holds the node itself."""
    model = mlp()
    kept = []

    def change(value):
        if not kept:
            graph = model[0].weight * 2
            graph.grad_fn.next_functions[0][0].register_prehook(lambda g: (g[0] * model.factor,))
            kept.append(graph)
        model.factor = value

    return model, change


@setting
def a_hook_of_all_modules(_):
    model = mlp()

    def doubles(module, inputs, output):
        return 2 * output if module is model else None

    return model, hooked(lambda: all_modules.register_module_forward_hook(doubles))


@setting
def a_hook_of_the_optimizer(trained):
    def doubles(optimizer, *_):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.mul_(2)

    return mlp(), hooked(lambda: trained().optimizer.register_step_pre_hook(doubles))


@setting
def a_hook_of_all_optimizers(trained):
    def doubles(optimizer, *_):
        if optimizer is trained().optimizer:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.mul_(2)

    return mlp(), hooked(lambda: all_optimizers.register_optimizer_step_pre_hook(doubles))


@setting
def a_hook_of_the_loss(trained):
    return mlp(), hooked(lambda: trained().loss.register_forward_hook(lambda m, x, loss: 2 * loss))


# Attributes that are exchanged on the way.


def exchanged(owner, name, other):
    """Return what puts another function in the place of an attribute, or puts it back."""
    usual = vars(owner).get(name, exchanged)

    def change(value):
        if value == 2.0:
            setattr(owner, name, other)
        elif usual is exchanged:
            delattr(owner, name)
        else:
            setattr(owner, name, usual)

    return change


@setting
def the_forward_of_a_module(_):
    model = mlp()
    return model, exchanged(model[1], "forward", lambda x: 2 * x.tanh())


@setting
def the_forward_of_torchs_class(_):
    return mlp(), exchanged(nn.Tanh, "forward", lambda self, x: 2 * x.tanh())


@setting
def the_call_of_torchs_class(_):
    return mlp(), exchanged(nn.Tanh, "__call__", lambda self, x: 2 * x.tanh())


@setting
def a_function_of_torch(_):
    return mlp(), exchanged(torch, "tanh", lambda x: 2 * x.tanh())


@setting
def a_functional_of_torch(_):
    return mlp(), exchanged(functional, "linear", lambda x, w, b=None: x @ w.t() * 2)


@setting
def the_functional_of_a_loss(_):
    return mlp(), exchanged(functional, "mse_loss", lambda p, t, **_: 2 * (p - t).square().mean())


class Rectified(Network):
    def forward(self, x):
        return self.inner(functional.relu(x)) * math.sqrt(2.0) + x.relu()[:, :2]


@setting
def a_method_of_torchs_tensor(_):
    return Rectified(), exchanged(torch.Tensor, "relu", lambda x: torch.relu(x) * 2)


@setting
def the_step_of_torchs_optimizer(_):
    usual = torch.optim.SGD.step

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)
        return usual(self, closure)

    return mlp(), exchanged(torch.optim.SGD, "step", step)


@setting
def the_step_of_an_optimizer(trained):
    def change(value):
        optimizer = trained().optimizer
        usual = vars(optimizer).get("usual_step", optimizer.step)
        optimizer.usual_step = usual

        def step(closure=None):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad.mul_(2)
            return usual(closure)

        optimizer.step = step if value == 2.0 else usual

    return mlp(), change


@setting
def zero_grad_of_an_optimizer(trained):
    def change(value):
        optimizer = trained().optimizer
        if value == 2.0:
            optimizer.zero_grad = lambda set_to_none=True: None
        else:
            del optimizer.zero_grad

    return mlp(), change


# The weights are made of something else from there on.


@setting
def a_parametrization(_):
    model = mlp()

    class Doubling(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def change(value):
        if value == 2.0:
            parametrize.register_parametrization(model[0], "weight", Doubling())
        else:
            parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)

    return model, change


@setting
def pruned_weights(_):
    model = mlp()

    def change(value):
        if value == 2.0:
            prune.l1_unstructured(model[0], "weight", amount=0.5)
        else:
            prune.remove(model[0], "weight")

    return model, change


# The process.


class OfTheProcess(Network):
    def forward(self, x):
        h = self.inner(x) * torch.get_num_threads() * torch.ones(1).dtype.itemsize
        if torch.are_deterministic_algorithms_enabled():
            h = h / 2
        if torch.get_float32_matmul_precision() == "medium":
            h = h / 2
        if torch.is_anomaly_enabled():
            h = h / 2
        return h / 4


@setting
def the_default_dtype(_):
    return OfTheProcess(), lambda value: torch.set_default_dtype(
        torch.float64 if value == 2.0 else torch.float32
    )


@setting
def the_number_of_threads(_):
    return OfTheProcess(), lambda value: torch.set_num_threads(int(value))


@setting
def deterministic_algorithms(_):
    return OfTheProcess(), lambda value: torch.use_deterministic_algorithms(value == 1.0, warn_only=True)


@setting
def the_precision_of_matrix_products(_):
    return OfTheProcess(), lambda value: torch.set_float32_matmul_precision(
        "medium" if value == 2.0 else "highest"
    )


@setting
def automatic_casts(_):
    def change(value):
        torch.set_autocast_cache_enabled(False)
        torch.set_autocast_enabled("cpu", value == 2.0)

    return mlp(), change


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return 2 * found if function is torch.tanh else found


@setting
def a_mode_for_functions_of_torch(_):
    mode = Doubling()
    return mlp(), lambda v: mode.__enter__() if v == 2.0 else mode.__exit__(None, None, None)


@setting
def how_saved_tensors_are_kept(_):
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 2 * t)
    return mlp(), lambda v: hooks.__enter__() if v == 2.0 else hooks.__exit__(None, None, None)


# Who sets it.


class Switch:
    """Sets something where its count says so, and back."""

    def __init__(self, change, when, at):
        self.change, self.when, self.at, self.is_on = change, when, at, False

    def __call__(self, calls):
        is_on = calls > 0 and self.when(calls, self.at)
        if is_on != self.is_on:
            self.change(2.0 if is_on else 1.0)
            self.is_on = is_on
        return 1.0


CHANGERS = changer = Table()


@changer
def a_schedule(trained, switch):
    trained.schedule = lr_scheduler.LambdaLR(trained.optimizer, switch)


class SwitchingSchedule(lr_scheduler.LRScheduler):
    def __init__(self, optimizer, switch):
        self.switch = switch
        super().__init__(optimizer)

    def get_lr(self):
        return [rate * self.switch(self.last_epoch) for rate in self.base_lrs]


@changer
def a_schedule_of_its_own(trained, switch):
    trained.schedule = SwitchingSchedule(trained.optimizer, switch)


class SwitchingOptimizer(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        self.switch(self.calls)


@changer
def an_optimizer(trained, switch):
    trained.optimizer = SwitchingOptimizer(trained.model.parameters(), lr=0.02, momentum=0.9)
    trained.optimizer.switch = switch


class SwitchingMetric:
    def __init__(self, switch):
        self.switch, self.calls = switch, 0

    def __call__(self, prediction, target):
        self.calls += 1
        return self.switch(self.calls)


@changer
def a_metric(trained, switch):
    trained.metrics = {"mine": SwitchingMetric(switch)}


#: Torch's schedules keep hold of the step that an optimizer has.
ONLY_BY = {"the step of torchs optimizer": "a metric"}


def set_between_steps(setting, changer, when, at):
    """Return a training of which the model reads a setting, and something else sets it."""
    made = []
    model, change = None, None

    def make_model():
        nonlocal model, change
        model, change = setting(lambda: made[0])
        return model

    made.append(new_training(make_model))
    changer(made[0], Switch(change, when, at))
    return made[0]


def _cases():
    moment = moments()
    changers = [*CHANGERS]
    for number, (name, setting) in enumerate(SETTINGS.items()):
        who = ONLY_BY.get(name, changers[number % len(changers)])
        _, step = next(moment)

        def make(at, setting=setting, changer=CHANGERS[who]):
            return set_between_steps(setting, changer, WHEN["five times from"], at)

        options = {"evaluate_every": 1} if who == "a metric" else {}
        yield Case(f"reads {name}, set by {who} for five steps from {step}", make, step, options=options)


SETTING_CASES = [*_cases()]
