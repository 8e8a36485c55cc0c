"""What other code changes between two checks, and puts back before the next: no check could find it."""

import functools

import pytest
import torch
from tests.training.by_hand import Changed, by_hand, by_train, contents, momentum, new_training
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from everystep import EverystepError

#: Programs are checked at steps 8 and 16.
ON, OFF, STEPS = 10, 13, 18


def metric_that(made, change):
    """Let a metric change a training at step ON, and back at step OFF."""
    calls = [0]

    def metric(prediction, target):
        calls[0] += 1
        if calls[0] in (ON, OFF):
            change(made, calls[0] == ON)
        return 0.0

    made.metrics = {"mine": metric}
    return made


def of(change, **parts):
    return lambda: metric_that(new_training(**parts), change)


def groups(parameters):
    one, two, *others = parameters
    settings = [{"params": [one, two], "lr": 0.05}, {"params": others, "lr": 0.001}]
    return torch.optim.SGD(settings, momentum=0.9)


def moves_a_parameter(made, is_on):
    one, two = (group["params"] for group in made.optimizer.param_groups)
    two.insert(0, one.pop()) if is_on else one.append(two.pop(0))


def loads_and_decays(made, is_on):
    if is_on:
        made.optimizer.load_state_dict(made.optimizer.state_dict())
    made.optimizer.param_groups[0]["weight_decay"] = 0.3 if is_on else 0.0


def widens_the_momentum(made, is_on):
    for entries in made.optimizer.state.values():
        dtype = torch.float64 if is_on else torch.float32
        entries["momentum_buffer"] = entries["momentum_buffer"].to(dtype)


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        super().step()


def exchanges_the_class(made, is_on):
    made.optimizer.__class__ = Twice if is_on else torch.optim.SGD


def of_the_loss(made, is_on):
    made.loss.keywords["beta"] = 0.1 if is_on else 1.0


def fills(place):
    def change(made, is_on):
        place(made.model).fill_(3.0 if is_on else 1.0)

    return change


def writes_past_torch(place):
    def change(made, is_on):
        place(made.model).numpy()[...] = 3.0 if is_on else 1.0

    return change


def holding(forward, **held):
    def make():
        model = Changed(forward)
        for name, value in held.items():
            setattr(model, name, value() if callable(value) else value)
        return model

    return make


def keeps_the_memory(model, h):
    return h + (model.inner[0].weight - model.start).sum()


def with_the_memory():
    model = Changed(keeps_the_memory)
    model.start = model.inner[0].weight.data
    return model


def exchanges_the_memory(made, is_on):
    parameter = made.model.inner[0].weight
    if is_on:
        made.old = parameter.data
        parameter.data = parameter.data * 0.9
    else:
        made.old.copy_(parameter.data)
        parameter.data = made.old


def ones():
    return torch.ones(2)


def in_a_tuple():
    return (torch.ones(2),)


CHANGES = {
    "a parameter moves to another group": of(moves_a_parameter, optimizer=groups),
    "the optimizer loads its own state": of(loads_and_decays),
    "momentum of another dtype": of(widens_the_momentum),
    "the class of the optimizer": of(exchanges_the_class),
    "an argument of the loss": of(
        of_the_loss, loss=lambda: functools.partial(functional.smooth_l1_loss, beta=1.0)
    ),
    "a tensor": of(fills(lambda m: m.s), model=holding(lambda m, h: h * m.s, s=ones)),
    "a tensor, past torch": of(
        writes_past_torch(lambda m: m.s), model=holding(lambda m, h: h * m.s, s=ones)
    ),
    "a tensor in tuples": of(
        fills(lambda m: m.s[0]), model=holding(lambda m, h: h * (m.s + m.s)[1], s=in_a_tuple)
    ),
    "memory that the model holds": of(exchanges_the_memory, model=with_the_memory),
    "a method of a tensor": of(
        lambda made, is_on: (
            setattr(made.model.s, "exp", lambda: made.model.s) if is_on else delattr(made.model.s, "exp")
        ),
        model=holding(lambda m, h: h * m.s.exp(), s=ones),
    ),
    "neighbouring lists": of(
        lambda made, is_on: (
            made.model.b.insert(0, made.model.a.pop())
            if is_on
            else made.model.a.append(made.model.b.pop(0))
        ),
        model=holding(lambda m, h: h * sum(m.a) + sum(m.b), a=lambda: [1.0, 2.0], b=lambda: [3.0, 4.0]),
    ),
}


def differs_or_same(make, engine="auto", **options):
    """Assert that a training has the bits of the loop, or is refused by name."""
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


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_changed_and_put_back_counts(kind):
    assert differs_or_same(CHANGES[kind], evaluate_every=1) is not None


class Causal(nn.Module):
    """torch looks whether the mask is causal, and then takes another kernel."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(2, 1, 8, dropout=0.0, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(2))

    def forward(self, x):
        return self.inner(x.reshape(-1, 2, 2), mask=self.mask)[:, 1]


def test_a_number_that_python_reads_from_what_does_not_change():
    def make():
        torch.manual_seed(1)
        return metric_that(new_training(model=Causal), fills(lambda model: model.mask))

    run = differs_or_same(make, evaluate_every=1, engine="program")
    assert run.facts.training.engine.by_program > OFF - ON


def with_dataset(wrap, change):
    def make():
        made = new_training()
        made.dataset = wrap(made.x, made.y)
        return metric_that(made, change)

    return make


DATASETS = {
    "indices": with_dataset(
        lambda x, y: Subset(TensorDataset(x, y), list(range(20))),
        lambda made, is_on: made.dataset.indices.reverse(),
    ),
    "tensors": with_dataset(
        lambda x, y: ConcatDataset([TensorDataset(x, y)]),
        lambda made, is_on: made.x.mul_(2.0 if is_on else 0.5),
    ),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_dataset_that_changes_for_a_while_is_refused(kind):
    assert differs_or_same(DATASETS[kind], evaluate_every=1, batch_size=8) is None


def test_a_dataset_that_a_schedule_changes_is_refused():
    def make():
        made = new_training()
        made.dataset = TensorDataset(made.x, made.y)

        def rate(number):
            made.x.mul_(2.0 if number % 2 else 0.5)
            return 1.0

        made.schedule = lr_scheduler.LambdaLR(made.optimizer, rate)
        return made

    assert differs_or_same(make) is None


def test_a_forward_that_changes_its_batch_changes_that_of_its_step_alone():
    def make():
        made = new_training(lambda: nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(4, 2)))
        made.dataset = TensorDataset(made.x.clone(), made.y.clone())
        return made

    run = differs_or_same(make)
    assert run is not None and run.verify(processes=1, progress=False).is_exact


#: They are set on the optimizer or the loss, not on the model.


# Gradients, which other code may read and keep.


@pytest.mark.parametrize("optimizer", [None, functools.partial(torch.optim.Adam, lr=0.01)])
def test_a_schedule_sees_the_gradients_of_its_step(optimizer):
    def make():
        made = new_training(optimizer=optimizer)

        def rate(number):
            gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
            return 1 / (1 + sum(gradient.norm().item() for gradient in gradients))

        made.schedule = lr_scheduler.LambdaLR(made.optimizer, rate)
        return made

    assert "calls a function of yours" in differs_or_same(make).facts.training.engine.reason


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
    def make():
        made = new_training(
            lambda: Changed(lambda m, h: h * max(1.0, h.max().item() * 0)),
            optimizer=lambda parameters: momentum([*parameters][2:]),
        )
        calls = [0]

        def metric(prediction, target):
            calls[0] += 1
            if calls[0] == ON:
                made.optimizer.add_param_group({"params": [*made.model.parameters()][:2]})
            return 0.0

        made.metrics = {"mine": metric}
        return made

    assert differs_or_same(make, evaluate_every=1, clip_norm=0.1) is not None


# How often the user's code is called.


def test_hooks_of_a_state_dict_are_not_called():
    def make():
        model = Changed(lambda m, h: h * (1 + 0.1 * len(m.log)))
        model.log = []
        model.register_state_dict_pre_hook(lambda *_: model.log.append(1))
        return model

    assert differs_or_same(lambda: new_training(make)) is not None


def test_losses_of_another_dtype_are_recorded_in_full():
    def make():
        return new_training(
            loss=lambda: (
                lambda p, t: (
                    (p - t).square().mean() if p.max().item() > 1.0 else (p.double() - t).square().mean()
                )
            )
        )

    assert differs_or_same(make) is not None


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.model[0].weight.data.mul_(0.9),
        lambda made: [own["momentum_buffer"].zero_() for own in made.optimizer.state.values()],
    ],
)
def test_what_a_metric_changes_after_the_last_step_is_recorded(change, engine):
    made = new_training()

    def metric(prediction, target):
        change(made)
        return 0.0

    made.metrics = {"mine": metric}
    run = by_train(made, steps=20, evaluate_every=5, engine=engine)
    assert run.verify(progress=False, processes=1).is_exact
