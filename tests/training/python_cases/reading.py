"""How the forward of a model comes to a factor that is 1 or 2 and counts how often it is asked for.

Each way is a function of the factor, and gives a model.
"""

import asyncio
import builtins
import contextlib
import functools
import importlib
import inspect
import linecache
import operator
import sys
import types
from pathlib import Path

import torch
from tests.training.by_hand import mlp, new_training
from tests.training.python_cases.case import WHEN, Case, Network, Table, moments
from tests.training.python_cases.places import PLACES, factor_of
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

__all__ = ["READINGS", "READING_CASES"]

READINGS = reading = Table()


class Changed(Network):
    """Hands what the network gives to a function of it and of the model."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(self, self.inner(x))


# Attributes of modules and helpers.


@reading
def a_property(factor):
    class Scaled(Network):
        @property
        def scale(self):
            return factor()

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@reading
def a_property_of_a_helper(factor):
    class Options:
        @property
        def scale(self):
            return factor()

    model = Changed(lambda model, h: h * model.options.scale)
    model.options = Options()
    return model


@reading
def a_property_made_of_a_lambda(factor):
    class Options:
        scale = property(lambda self: factor())

    options = Options()
    return Changed(lambda model, h: h * options.scale)


@reading
def a_static_method(factor):
    class Scaled(Network):
        @staticmethod
        def scale(h):
            return h * factor()

        def forward(self, x):
            return self.scale(self.inner(x))

    return Scaled()


@reading
def a_class_method(factor):
    class Scaled(Network):
        @classmethod
        def scale(cls, h):
            return h * factor()

        def forward(self, x):
            return self.scale(self.inner(x))

    return Scaled()


@reading
def a_partial_method(factor):
    class Scaled(Network):
        def scaled(self, by, h):
            return h * by()

        scale = functools.partialmethod(scaled, factor)

        def forward(self, x):
            return self.scale(self.inner(x))

    return Scaled()


@reading
def a_descriptor(factor):
    class Scale:
        def __get__(self, instance, owner):
            return factor()

        def __set__(self, instance, value):
            raise AttributeError

    class Scaled(Network):
        scale = Scale()

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@reading
def a_descriptor_without_set(factor):
    class Scale:
        def __get__(self, instance, owner):
            return factor()

    class Options:
        scale = Scale()

    return Changed(lambda model, h: h * Options.scale)


@reading
def a_descriptor_that_calls(factor):
    """`forward` itself is found by a descriptor."""

    class Forward:
        def __get__(self, instance, owner):
            scale = factor()
            return lambda x: instance.inner(x) * scale

    class Scaled(Network):
        forward = Forward()

    return Scaled()


@reading
def a_property_of_a_metaclass(factor):
    class Meta(type):
        @property
        def scale(cls):
            return factor()

    class Options(metaclass=Meta):
        pass

    return Changed(lambda model, h: h * Options.scale)


@reading
def getattr_of_the_module(factor):
    class Scaled(Network):
        def __getattr__(self, name):
            if name == "scale":
                return factor()
            return super().__getattr__(name)

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@reading
def getattribute_of_the_module(factor):
    class Scaled(Network):
        def __getattribute__(self, name):
            if name == "scale":
                return factor()
            return super().__getattribute__(name)

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@reading
def setattr_of_the_module(factor):
    class Scaled(Network):
        def __setattr__(self, name, value):
            super().__setattr__(name, value * factor() if name == "last" else value)

        def forward(self, x):
            self.last = self.inner(x)
            return self.last

    return Scaled()


@reading
def an_attribute_that_is_kept(factor):
    class Scaled(Network):
        def forward(self, x):
            self.scale = factor()
            return self.inner(x) * self.scale

    return Scaled()


@reading
def a_property_of_a_base_class(factor):
    class Base(Network):
        @property
        def scale(self):
            return factor()

    class Scaled(Base):
        @property
        def scale(self):
            return super().scale

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@reading
def super_in_the_middle(factor):
    class Middle(Network):
        def forward(self, x):
            return super().forward(x) * factor()

    class Scaled(Middle):
        def forward(self, x):
            return super().forward(x) + 0.0

    return Scaled()


@reading
def a_mixin(factor):
    class Scales:
        def forward(self, x):
            return super().forward(x) * factor()

    class Scaled(Scales, Network):
        pass

    return Scaled()


# Modules of torch that hold what is the user's.


@reading
def an_activation_of_torchs_encoder_layer(factor):
    def activation(h):
        return nn.functional.relu(h) * factor()

    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=activation, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten(), nn.Linear(4, 2))


@reading
def a_distance_of_torchs_triplet_loss(factor):
    loss = nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: (a - b).square().sum(1) * factor()
    )

    class Pulled(Network):
        def forward(self, x):
            h = self.inner(x)
            return h + loss(h, h.flip(0), h.roll(1, 0))

    return Pulled()


@reading
def a_linear_with_a_forward_of_its_own(factor):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * factor()

    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Scaled(8, 2))


@reading
def a_linear_with_a_weight_that_is_a_property(factor):
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.kernel = self._parameters.pop("weight")

        @property
        def weight(self):
            return self.kernel * factor()

        @weight.setter
        def weight(self, value):
            self.register_parameter("weight", value)

    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Scaled(8, 2))


@reading
def a_dropout_with_a_p_that_is_a_property(factor):
    class Scheduled(nn.Dropout):
        @property
        def p(self):
            return 0.25 * factor()

        @p.setter
        def p(self, value):
            pass

    return nn.Sequential(nn.Linear(4, 8), Scheduled(), nn.Linear(8, 2))


@reading
def a_function_of_torchs_parametrize(factor):
    class Scale(nn.Module):
        def forward(self, weight):
            return weight * factor()

    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Scale())
    return model


@reading
def a_cached_parametrization(factor):
    class Scale(nn.Module):
        def forward(self, weight):
            return weight * factor()

    class Cached(Network):
        def forward(self, x):
            with parametrize.cached():
                return self.inner(x) + self.inner(-x)

    model = Cached()
    parametrize.register_parametrization(model.inner[2], "weight", Scale())
    return model


@reading
def a_sequential_with_an_iter_of_its_own(factor):
    class Repeated(nn.Sequential):
        def __iter__(self):
            yield from super().__iter__()
            if factor() > 1:
                yield nn.Tanh()

    return Repeated(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@reading
def a_module_list_with_a_getitem_of_its_own(factor):
    class Chosen(nn.ModuleList):
        def __getitem__(self, number):
            return super().__getitem__(int(factor()) - 1)

    class Choosing(Network):
        def __init__(self):
            super().__init__()
            self.last = Chosen([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            return self.last[0](self.inner(x))

    return Choosing()


@reading
def a_module_list_with_a_len_of_its_own(factor):
    class Short(nn.ModuleList):
        def __len__(self):
            return int(factor())

    class Layers(Network):
        def __init__(self):
            super().__init__()
            self.last = Short([nn.Linear(2, 2)])

        def forward(self, x):
            return self.inner(x) * len(self.last)

    return Layers()


@reading
def a_module_dict_with_an_iter_of_its_own(factor):
    class Active(nn.ModuleDict):
        def values(self):
            return [*super().values()][: int(factor())]

    class Heads(Network):
        def __init__(self):
            super().__init__()
            self.heads = Active({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

        def forward(self, x):
            h = self.inner(x)
            return sum(head(h) for head in self.heads.values())

    return Heads()


@reading
def children_of_its_own(factor):
    class Layers(Network):
        def children(self):
            return [self.inner] * int(factor())

        def forward(self, x):
            return sum(child(x) for child in self.children())

    return Layers()


@reading
def an_identity_that_is_derived(factor):
    class Noting(nn.Identity):
        def forward(self, x):
            return x * factor()

    return nn.Sequential(nn.Linear(4, 8), Noting(), nn.Linear(8, 2))


@reading
def a_call_of_the_class(factor):
    class Scaled(Network):
        def __call__(self, x):
            return super().__call__(x) * factor()

    return Scaled()


@reading
def a_call_impl_of_the_class(factor):
    class Scaled(Network):
        def _call_impl(self, x):
            return super()._call_impl(x) * factor()

    return Scaled()


@reading
def a_call_impl_of_the_instance(factor):
    model = mlp()
    inner = model[0]._call_impl
    model[0]._call_impl = lambda x: inner(x) * factor()
    return model


@reading
def a_forward_of_the_instance(factor):
    model = mlp()
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight) * factor()
    return model


@reading
def a_forward_that_is_bound_to_another(factor):
    class Scale:
        def forward(self, x):
            return x * factor()

    model = mlp()
    model[1].forward = Scale().forward
    return model


@reading
def a_method_given_by_types(factor):
    model = mlp()
    model[2].forward = types.MethodType(
        lambda self, x: nn.functional.linear(x, self.weight) * factor(), model[2]
    )
    return model


@reading
def a_forward_hook(factor):
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output * factor())
    return model


@reading
def a_forward_hook_before(factor):
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor(),))
    return model


@reading
def a_backward_hook(factor):
    model = mlp()
    model[2].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * factor(),))
    return model


@reading
def a_hook_of_a_parameter(factor):
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient * factor())
    return model


@reading
def a_hook_after_accumulation(factor):
    model = mlp()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * factor()))
    return model


@reading
def a_hook_of_a_gradient_accumulator(factor):
    model = mlp()
    weight = model[0].weight
    model.accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
    model.accumulator.register_prehook(lambda gradients: (gradients[0] * factor(),))
    return model


@reading
def a_hook_of_an_activation(factor):
    def change(model, h):
        h.register_hook(lambda gradient: gradient * factor())
        return h

    return Changed(change)


@reading
def a_hook_of_a_grad_node(factor):
    def change(model, h):
        h.grad_fn.register_prehook(lambda gradients: (gradients[0] * factor(),))
        return h

    return Changed(change)


@reading
def hooks_of_saved_tensors(factor):
    def change(model, h):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * factor()):
            return h.square()

    return Changed(change)


@reading
def a_backward_of_the_users(factor):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(context, h):
            return h.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * factor()

    return Changed(lambda model, h: Scale.apply(h))


@reading
def a_forward_of_an_autograd_function(factor):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(context, h):
            context.factor = factor()
            return h * context.factor

        @staticmethod
        def backward(context, gradient):
            return gradient * context.factor

    return Changed(lambda model, h: Scale.apply(h))


# Functions.


@reading
def a_lambda(factor):
    return Changed(lambda model, h: (lambda t: t * factor())(h))


@reading
def a_nested_function(factor):
    def change(model, h):
        def scale(t):
            return t * factor()

        return scale(h)

    return Changed(change)


@reading
def a_recursion(factor):
    def repeated(h, times):
        return h if times == 0 else repeated(h * 1.1, times - 1)

    return Changed(lambda model, h: repeated(h, int(factor())))


@reading
def a_partial(factor):
    def scale(h, by):
        return h * by()

    return Changed(lambda model, h: functools.partial(scale, by=factor)(h))


@reading
def a_decorator(factor):
    def scaled(function):
        @functools.wraps(function)
        def wrapped(self, x):
            return function(self, x) * factor()

        return wrapped

    class Scaled(Network):
        @scaled
        def forward(self, x):
            return self.inner(x)

    return Scaled()


@reading
def a_decorator_that_is_an_object(factor):
    class Scale:
        def __init__(self, function):
            functools.update_wrapper(self, function)
            self.function = function

        def __call__(self, h):
            return self.function(h) * factor()

    @Scale
    def change(h):
        return h

    return Changed(lambda model, h: change(h))


@reading
def a_single_dispatch(factor):
    @functools.singledispatch
    def scale(value):
        return value

    scale.register(Tensor, lambda value: value * factor())
    return Changed(lambda model, h: scale(h))


@reading
def a_method_caller(factor):
    class Scale:
        def of(self, h):
            return h * factor()

    model = Changed(lambda model, h: operator.methodcaller("of", h)(model.scale))
    model.scale = Scale()
    return model


@reading
def an_attribute_getter(factor):
    class Options:
        scale = property(lambda self: factor())

    model = Changed(lambda model, h: h * operator.attrgetter("options.scale")(model))
    model.options = Options()
    return model


@reading
def an_item_getter(factor):
    class Options(dict):
        def __getitem__(self, key):
            return factor()

    model = Changed(lambda model, h: h * operator.itemgetter("scale")(model.options))
    model.options = Options(scale=1.0)
    return model


@reading
def a_map(factor):
    return Changed(lambda model, h: torch.cat([*map(lambda t: t * factor(), h.split(5))]))  # noqa: C417


@reading
def a_filter(factor):
    return Changed(lambda model, h: h * sum(filter(lambda n: factor() > 1 or n == 1, [1, 2])))


@reading
def a_key_of_sorted(factor):
    return Changed(lambda model, h: h * sorted([1, 2], key=lambda n: n * (-1) ** factor())[0])


@reading
def a_key_of_max(factor):
    return Changed(lambda model, h: h * max([1, 2], key=lambda n: n if factor() > 1 else -n))


@reading
def a_reduction(factor):
    return Changed(lambda model, h: functools.reduce(lambda t, n: t * factor(), [1], h))


@reading
def a_sum_of_a_generator(factor):
    return Changed(lambda model, h: h * sum(factor() for _ in range(2)))


@reading
def a_comprehension(factor):
    return Changed(lambda model, h: torch.stack([t * factor() for t in h]))


@reading
def all_of_a_generator(factor):
    return Changed(lambda model, h: 2 * h if all(factor() > 1 for _ in range(1)) else h)


@reading
def an_iterator_with_a_sentinel(factor):
    return Changed(lambda model, h: h * next(iter(factor, 1.0), 1.0))


@reading
def a_generator_function(factor):
    def factors():
        yield factor()

    def change(model, h):
        for by in factors():
            h = h * by
        return h

    return Changed(change)


@reading
def an_asynchronous_function(factor):
    async def scale(h):
        return h * factor()

    def change(model, h):
        running = scale(h)
        try:
            running.send(None)
        except StopIteration as result:
            return result.value

    return Changed(change)


@reading
def an_event_loop(factor):
    async def scale(h):
        await asyncio.sleep(0)
        return h * factor()

    return Changed(lambda model, h: asyncio.run(scale(h)) if factor() else h)


@reading
def executed_text(factor):
    namespace = {"factor": factor}
    exec("def change(model, h):\n    return h * factor()\n", namespace)
    return Changed(namespace["change"])


@reading
def executed_text_with_a_source(factor):
    source = "def change(model, h):\n    return h * factor()\n"
    name = "<executed text>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"factor": factor}
    exec(compile(source, name, "exec"), namespace)
    return Changed(namespace["change"])


@reading
def an_evaluated_text(factor):
    return Changed(lambda model, h: eval("h * factor()", {"h": h, "factor": factor}))


@reading
def a_function_with_another_source(factor):
    """Where the source is looked for, there is another text."""
    path = Path("written_module_of_a_user.py")
    path.write_text("def change(model, h):\n    return h * factor()\n")
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.invalidate_caches()
        sys.modules.pop("written_module_of_a_user", None)
        module = importlib.import_module("written_module_of_a_user")
    finally:
        del sys.path[0]
    module.factor = factor
    path.write_text("def change(model, h):\n    return h\n\n")
    linecache.checkcache()
    return Changed(module.change)


@reading
def a_function_that_says_it_is_another(factor):
    def pretended(model, h):
        return h

    @functools.wraps(pretended)
    def change(model, h):
        return h * factor()

    return Changed(change)


@reading
def a_signature_that_lies(factor):
    def change(model, h):
        return h * factor()

    change.__signature__ = inspect.signature(lambda model, h: h)
    change.__module__, change.__qualname__ = "torch.nn.functional", "relu"
    return Changed(change)


@reading
def a_class_that_says_it_is_torchs(factor):
    class Scaled(nn.Identity):
        def forward(self, x):
            return x * factor()

    Scaled.__module__, Scaled.__qualname__ = nn.Identity.__module__, "Identity"
    Scaled.__name__ = "Identity"
    return nn.Sequential(nn.Linear(4, 8), Scaled(), nn.Linear(8, 2))


@reading
def a_function_made_of_code(factor):
    def change(model, h):
        return h * scale()  # noqa: F821

    return Changed(types.FunctionType(change.__code__, {"scale": factor}))


@reading
def a_builtin_that_is_hidden(factor):
    """A global of the name `len`."""

    def change(model, h):
        return h * len(h.shape)

    return Changed(types.FunctionType(change.__code__, {"len": lambda shape: factor()}))


@reading
def other_builtins(factor):
    def change(model, h):
        return h * len(h.shape)

    others = vars(builtins) | {"len": lambda shape: factor()}
    return Changed(types.FunctionType(change.__code__, {"__builtins__": others}))


# Statements.


@reading
def a_try(factor):
    def change(model, h):
        try:
            if factor() > 1:
                raise ValueError
        except ValueError:
            return 2 * h
        return h

    return Changed(change)


@reading
def a_finally(factor):
    def change(model, h):
        try:
            return h * model.scale
        finally:
            model.scale = factor()

    model = Changed(change)
    model.scale = 1.0
    return model


@reading
def an_error_that_is_suppressed(factor):
    def change(model, h):
        with contextlib.suppress(ZeroDivisionError):
            h = h + 1 / (2 - factor())
        return h

    return Changed(change)


@reading
def a_context_manager(factor):
    @contextlib.contextmanager
    def scaled():
        yield factor()

    def change(model, h):
        with scaled() as scale:
            return h * scale

    return Changed(change)


@reading
def an_exit_stack(factor):
    def change(model, h):
        kept = [h]
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: kept.append(h * factor()))
        return kept[-1]

    return Changed(change)


@reading
def a_walrus(factor):
    return Changed(lambda model, h: h * by if (by := factor()) > 1 else h)


@reading
def a_match(factor):
    def change(model, h):
        match factor():
            case 2.0:
                return 2 * h
            case _:
                return h

    return Changed(change)


@reading
def a_while(factor):
    def change(model, h):
        tries = 0
        while tries < 2 and factor() > 1:
            h, tries = h * 1.1, tries + 1
        return h

    return Changed(change)


@reading
def star_arguments(factor):
    def scale(h, *factors, **named):
        return h * factors[0] * named["by"]

    return Changed(lambda model, h: scale(h, *[factor()], **{"by": 1.0}))


@reading
def an_augmented_assignment(factor):
    def change(model, h):
        by = 1.0
        by *= factor()
        return h * by

    return Changed(change)


@reading
def an_assertion(factor):
    def change(model, h):
        kept = [1.0]
        assert kept.append(factor()) is None
        return h * kept[1]

    return Changed(change)


@reading
def vars_of_the_module(factor):
    model = Changed(lambda model, h: h * vars(model)["by"]())
    model.by = factor
    return model


@reading
def locals_of_the_function(factor):
    def change(model, h):
        by = factor()
        return h * locals()["by"]

    return Changed(change)


@reading
def the_frame_of_the_caller(factor):
    def scale(h):
        return h * sys._getframe(1).f_locals["by"]

    def change(model, h):
        by = factor()  # noqa: F841
        return scale(h)

    return Changed(change)


# What libraries call.


@reading
def a_checkpoint(factor):
    """The backward calls the function once more."""
    return Changed(lambda model, h: checkpoint(lambda t: (t * factor()).tanh(), h, use_reentrant=False))


@reading
def a_functional_call(factor):
    model = mlp()

    class Scaled(Network):
        def forward(self, x):
            weights = {name: p * factor() for name, p in model.named_parameters()}
            return functional_call(model, weights, (x,)) + self.inner(x)

    return Scaled()


@reading
def a_vectorized_map(factor):
    return Changed(lambda model, h: vmap(lambda row: row * factor())(h))


@reading
def a_function_applied_to_modules(factor):
    def change(model, h):
        factors = []
        model.inner.apply(lambda module: factors.append(factor()))
        return h * max(factors)

    return Changed(change)


@reading
def a_function_of_an_averaged_model(factor):
    class Averaging(Network):
        def __init__(self):
            super().__init__()
            average = lambda mean, p, n: mean + (p - mean) / factor()  # noqa: E731
            self.average = AveragedModel(self.inner, avg_fn=average)
            self.average.requires_grad_(False)

        def forward(self, x):
            self.average.update_parameters(self.inner)
            return self.inner(x) + self.average(x)

    return Averaging()


@reading
def a_tensor_of_a_class_of_its_own(factor):
    class Scaled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            found = super().__torch_function__(function, types, args, kwargs or {})
            return found * factor() if function is torch.tanh else found

    def change(model, h):
        return torch.tanh(h.as_subclass(Scaled)).as_subclass(Tensor)

    return Changed(change)


@reading
def a_mode_for_functions_of_torch(factor):
    class Scaling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            return found * factor() if function is torch.tanh else found

    def change(model, h):
        with Scaling():
            return torch.tanh(h)

    return Changed(change)


@reading
def a_function_applied_to_a_tensor(factor):
    return Changed(lambda model, h: h * torch.zeros(2).apply_(lambda n: factor()))


@reading
def an_initialisation(factor):
    """`torch.nn.init` fills a tensor that is not a parameter."""

    def change(model, h):
        return h * nn.init.constant_(torch.empty(2), factor())

    return Changed(change)


@reading
def a_weight_norm(factor):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 2))

    class Scaled(Network):
        def forward(self, x):
            with torch.no_grad():
                model[0].parametrizations.weight.original0.fill_(factor())
            return model(x) + self.inner(x)

    return Scaled()


def _cases():
    place = PLACES["a helper object"]
    for (name, model), (when, step) in zip(READINGS.items(), moments(), strict=False):

        def make(at, model=model, when=WHEN[when]):
            return new_training(lambda: model(factor_of(place, when, at)))

        yield Case(f"reads a count by {name}, {when} {step}", make, step, program=False)


READING_CASES = [*_cases()]
