"""What a metric of the user's changes between two steps, and data that is read at every step."""

import random

import numpy as np
import torch
from tests.training.by_hand import Made, mlp, momentum, new_training
from tests.training.python_cases.case import Case, Table
from torch import nn
from torch.utils.data import Dataset, TensorDataset

__all__ = ["METRIC_CASES"]

#: Steps between two calls of a metric; a change is made at the first call after its step.
EVALUATE_EVERY = 3

METRICS = metric = Table()
DATASETS = dataset = Table()


# Each is called once, with the training, when it is due.


@metric
def halves_the_lr(trained):
    trained.optimizer.param_groups[0]["lr"] *= 0.5


@metric
def sets_a_tensor_as_lr(trained):
    trained.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


@metric
def sets_the_momentum(trained):
    trained.optimizer.param_groups[0]["momentum"] = 0.5


@metric
@torch.no_grad()
def shrinks_parameters(trained):
    for parameter in trained.model.parameters():
        parameter.mul_(0.5)


@metric
def shrinks_parameters_by_numpy(trained):
    for parameter in trained.model.parameters():
        array = parameter.detach().numpy()
        array *= 0.5


@metric
def loads_a_state(trained):
    state = {name: 0.5 * tensor for name, tensor in trained.model.state_dict().items()}
    trained.model.load_state_dict(state)


@metric
def loads_a_state_by_assignment(trained):
    """The model has other parameters afterwards than its optimizer has."""
    state = {n: nn.Parameter(0.5 * p.detach()) for n, p in trained.model.named_parameters()}
    trained.model.load_state_dict(trained.model.state_dict() | state, assign=True)


@metric
def sets_a_buffer(trained):
    trained.model[1].running_mean.fill_(0.5)
    trained.model[1].eval()


@metric
def exchanges_a_buffer(trained):
    trained.model[1].running_mean = torch.full((8,), 0.5)
    trained.model[1].eval()


@metric
def resets_the_count_of_a_batch_norm(trained):
    trained.model[1].momentum = None
    trained.model[1].reset_running_stats()
    trained.model[1].eval()


@metric
def calls_eval(trained):
    trained.model.eval()


@metric
def sets_the_dropout(trained):
    trained.model[2].p = 0.7


@metric
def seeds_the_generator(trained):
    torch.manual_seed(3)


@metric
def sets_the_state_of_the_generator(trained):
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())


@metric
def freezes_a_layer_that_keeps_its_gradient(trained):
    trained.model[0].weight.requires_grad_(False)
    trained.model[0].weight.grad = torch.ones(8, 4)


@metric
def adds_a_param_group(trained):
    """The last parameter, which the optimizer does not have before."""
    trained.optimizer.add_param_group({"params": [trained.model[3].bias], "lr": 0.1})


@metric
def removes_a_parameter_from_its_group(trained):
    parameter = trained.optimizer.param_groups[0]["params"].pop(0)
    del trained.optimizer.state[parameter]


@metric
def adds_a_hook_to_the_optimizer(trained):
    trained.optimizer.register_step_post_hook(lambda *_: shrinks_parameters(trained))


@metric
def exchanges_the_momentum(trained):
    for entries in trained.optimizer.state.values():
        entries["momentum_buffer"] = -entries["momentum_buffer"]


@metric
def clears_the_state(trained):
    trained.optimizer.state.clear()


@metric
def loads_the_state_of_the_optimizer(trained):
    state = trained.optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.01
    trained.optimizer.load_state_dict(state)


@metric
def changes_the_data(trained):
    trained.x.mul_(1.1)


@metric
def changes_the_data_by_numpy(trained):
    trained.x.numpy()[0] = 1.0


@metric
def takes_steps_of_its_own(trained):
    for _ in range(2):
        trained.optimizer.zero_grad()
        with torch.enable_grad():
            trained.loss(trained.model(trained.x), trained.y).backward()
        trained.optimizer.step()


@metric
def exchanges_the_loss(trained):
    """The loss is a module, and gets another forward."""
    trained.loss.forward = lambda prediction, target: 2 * (prediction - target).square().mean()


@metric
def sets_the_reduction_of_the_loss(trained):
    trained.loss.reduction = "sum"
    trained.optimizer.param_groups[0]["lr"] = 0.002


@metric
def raises_an_error(trained):
    raise ZeroDivisionError("in a metric")


class Metric:
    """Changes the training at the first call at or after a step."""

    def __init__(self, trained, change, at):
        self.trained, self.change, self.left, self.calls = trained, change, at, 0

    def __call__(self, prediction, target):
        self.calls += 1
        if self.calls * EVALUATE_EVERY >= self.left:
            self.left = float("inf")
            self.change(self.trained)
        return self.calls


def with_everything():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


def measured(change, at):
    left_out = 1 if change is adds_a_param_group else 0
    trained = new_training(
        with_everything,
        optimizer=lambda parameters: momentum([*parameters][: 6 - left_out]),
    )
    trained.metrics = {"mine": Metric(trained, change, at)}
    return trained


# Data sets.


class Rows(Dataset):
    """The same rows at each look, unless it is derived."""

    def __init__(self, at):
        self.x, self.y = torch.randn(20, 4), torch.randn(20, 2)
        self.at, self.calls = at, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.calls += 1
        return self.row(self.x[row], self.calls // 20, row), self.y[row]

    def row(self, x, reads, row):
        return x


@dataset
class ChangesOnTheWay(Rows):
    """Each row, from the step on; 20 rows are read at each."""

    def row(self, x, reads, row):
        return 2 * x if reads >= self.at else x


@dataset
class ChangesAtEveryRead(Rows):
    def row(self, x, reads, row):
        return x * (1 + self.calls / 1000) * (2 if reads == self.at else 1)


@dataset
class DrawsFromTorch(Rows):
    def row(self, x, reads, row):
        return x + torch.randn(4) * 0.1


@dataset
class DrawsFromPythonAndNumpy(Rows):
    def row(self, x, reads, row):
        return x * random.uniform(0.9, 1.1) + 0.1 * float(np.random.rand())


@dataset
class HasAGeneratorOfItsOwn(Rows):
    def __init__(self, at):
        super().__init__(at)
        self.generator = torch.Generator().manual_seed(1)

    def row(self, x, reads, row):
        return x + torch.randn(4, generator=self.generator) * 0.1


@dataset
class HasARandomOfItsOwn(Rows):
    def __init__(self, at):
        super().__init__(at)
        self.random = random.Random(1)

    def row(self, x, reads, row):
        return x * self.random.uniform(0.9, 1.1)


@dataset
class ChangesItsTensors(Rows):
    def row(self, x, reads, row):
        return x.mul_(1.001)


@dataset
class DrawsForFewRows(Rows):
    """Only for rows that a sample may leave out."""

    def row(self, x, reads, row):
        return x + torch.randn(4) * 0.1 if row in (1, 7) else x


@dataset
class GivesTheSame(Rows):
    pass


def of_dataset(kind, at):
    trained = new_training(mlp)
    return Made(trained.model, trained.x, trained.y, trained.loss, trained.optimizer, dataset=kind(at))


def of_tensors(at):
    trained = new_training(mlp)
    rows = TensorDataset(trained.x, trained.y)
    return Made(trained.model, trained.x, trained.y, trained.loss, trained.optimizer, dataset=rows)


#: These draw from the first step on.
WITHOUT_A_MOMENT = ("draws", "has", "changes its tensors", "gives")


def _cases():
    for number, (name, change) in enumerate(METRICS.items()):

        def make(at, change=change):
            return measured(change, at)

        step = (5, 9, 12, 14)[number % 4]
        options = {"evaluate_every": EVALUATE_EVERY}
        raises = change in (raises_an_error,)
        yield Case(f"a metric {name} after {step}", make, step, raises=raises, options=options)
    for name, kind in DATASETS.items():

        def make_rows(at, kind=kind):
            return of_dataset(kind, at)

        at = None if name.startswith(WITHOUT_A_MOMENT) else 4
        for batch_size in (None, 8):
            rows = "all rows" if batch_size is None else f"{batch_size} rows"
            options = {"batch_size": batch_size}
            yield Case(f"a data set {name}, {rows} a step", make_rows, at, options=options)
    yield Case("a data set of tensors", of_tensors)


METRIC_CASES = [*_cases()]
