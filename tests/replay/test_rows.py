"""What each row makes of the loss and of the gradients: against gradients of single rows by torch."""

import json

import numpy as np
import pytest
import torch
from benchmarks.rows import planted, trained
from tests.descent import descend, looped
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

import everystep
from everystep import ExpressionError, RunError, UsageError
from everystep.answers.rows import Share
from everystep.cli import app

N, STEP = 20, 3


class Encoder(nn.Module):
    """Tokens (N, T) to logits (N, 12, T)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 12)

    def forward(self, x):
        return self.out(self.layer(self.embedding(x) + self.position)).transpose(1, 2)


class Attention(nn.Module):
    """Attention by single operators, with a mask and a factor from outside."""

    def __init__(self):
        super().__init__()
        self.given, self.out = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x):
        query, key, value = self.given(x).reshape(len(x), 3, 1, 4, 2).transpose(-1, -2).unbind(1)
        mask = torch.ones(2, 2, dtype=torch.bool).tril()
        with sdpa_kernel(SDPBackend.MATH):
            found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(found.flatten(1)) * torch.tensor(np.float32(1.5))


class Chosen(nn.Module):
    """Only the largest numbers of each row, sorted."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x).topk(3, dim=1).values)


class Recurrent(nn.Module):
    """The last output of an LSTM in both directions, two layers deep."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.memory(x)[0][:, -1])


class Pairs(nn.Module):
    """Products of pairs of numbers, as in bilinear attention."""

    def __init__(self):
        super().__init__()
        self.one, self.pair = nn.Linear(6, 4), nn.Bilinear(4, 6, 3)

    def forward(self, x):
        return self.pair(torch.tanh(self.one(x)), x)


class Positions(nn.Module):
    """Attention with a table of relative positions, as in Swin."""

    def __init__(self):
        super().__init__()
        self.table, self.of_words = nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.randn(12, 8))
        self.register_buffer("place", torch.arange(5)[:, None] - torch.arange(5)[None] + 4)
        self.out = nn.Linear(8, 12)

    def forward(self, x):
        words = self.of_words[x]
        heads = words.unflatten(-1, (2, 4)).transpose(1, 2)
        bias = self.table[self.place.flatten()].reshape(5, 5, 2).permute(2, 0, 1)
        weights = (heads @ heads.transpose(-1, -2) + bias).softmax(-1)
        return self.out((weights @ heads).transpose(1, 2).flatten(2)).transpose(1, 2)


class Vectors(nn.Module):
    """A prediction by vectors, without a matrix for them."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(6, 4), nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return torch.sigmoid(self.first(x)) @ self.weight + self.bias


class Pooled(nn.Module):
    """Pooling in windows by chance, the same for all rows, and numbers that a mask or an index sets."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 4, 1), nn.Linear(12, 2)
        self.register_buffer("samples", torch.rand(1, 4, 2), persistent=False)
        self.register_buffer("unused", torch.tensor([1]), persistent=False)

    def forward(self, x):
        samples = self.samples.expand(len(x), 4, 2)
        found = self.first(x.transpose(1, 2)).unsqueeze(-1)
        found = nn.functional.fractional_max_pool2d(found, (2, 1), (3, 1), _random_samples=samples)
        found[found > 0.9] = 0.9
        found.index_fill_(1, self.unused, 0.5)  # as `found[:, [1]] = 0.5` from torch 2.15 on
        return self.last(found.flatten(1))


class Masked(nn.Module):
    """A mean over the numbers that count."""

    def forward(self, out, y):
        mask = (y > 0).float()
        return ((out - y) ** 2 * mask).sum() / mask.sum().clamp(min=1)


def _images():
    return torch.randn(N, 1, 9, 9), torch.randint(0, 4, (N,))


def _columns():
    return torch.randn(N, 6), torch.randn(N, 3)


def _network(*modules):
    return nn.Sequential(nn.Conv2d(1, 4, 3), *modules, nn.Flatten(), nn.Linear(196, 4))


NETWORKS = {
    "chapter": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        _columns,
        nn.MSELoss(reduction="sum"),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, stride=2)),
            *(nn.Flatten(), nn.Linear(6, 4)),
        ),
        _images,
        nn.CrossEntropyLoss(),
    ),
    "padding, pooling, upsampling": (
        lambda: nn.Sequential(
            *(nn.ReplicationPad2d((1, 0, 2, 1)), nn.ReflectionPad2d(1), nn.Conv2d(1, 4, 3)),
            *(nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2, mode="bilinear")),
            *(nn.Flatten(), nn.Linear(144, 4)),
        ),
        _images,
        nn.CrossEntropyLoss(),
    ),
    "attention": (Attention, _columns, nn.MSELoss()),
    "vectors": (Vectors, lambda: (torch.randn(N, 6), torch.randn(N)), nn.MSELoss()),
    "pairs": (Pairs, _columns, nn.MSELoss()),
    "positions": (
        Positions,
        lambda: (torch.randint(0, 12, (N, 5)), torch.randint(0, 12, (N, 5))),
        nn.CrossEntropyLoss(),
    ),
    "margins of several classes": (
        lambda: nn.Sequential(nn.Linear(6, 4)),
        lambda: (torch.randn(N, 6), torch.tensor([[1, 3, -1, 0], [0, -1, 2, 3]]).repeat(N // 2, 1)),
        nn.MultiLabelMarginLoss(),
    ),
    "chosen": (Chosen, _columns, nn.MSELoss()),
    "group norm": (lambda: _network(nn.GroupNorm(2, 4), nn.SiLU()), _images, nn.CrossEntropyLoss()),
    "group norm of channels last": (  # torch crashes if it is asked for the gradient of weights alone
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(196, 4))
        ).to(memory_format=torch.channels_last),
        lambda: (torch.randn(N, 2, 9, 9), torch.randint(0, 4, (N,))),
        nn.CrossEntropyLoss(),
    ),
    "encoder": (
        Encoder,
        lambda: (torch.randint(0, 12, (N, 5)), torch.randint(0, 12, (N, 5))),
        nn.CrossEntropyLoss(),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)),
        lambda: (torch.randn(N, 6), torch.rand(N, 3)),
        nn.BCEWithLogitsLoss(),
    ),
    "soft labels": (lambda: nn.Linear(6, 3), _columns, nn.CrossEntropyLoss()),
    "divergence": (
        lambda: nn.Linear(6, 3),
        lambda: (torch.randn(N, 6), torch.rand(N, 3)),
        nn.KLDivLoss(reduction="batchmean"),
    ),
    "absolute": (lambda: nn.Linear(6, 3), _columns, nn.L1Loss()),
}


def _train(directory, model, data, loss, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"steps": 4, "batch_size": 7, "run": directory, "progress": False} | more
    return everystep.train(model, data, loss=loss, optimizer=optimizer, **settings)


def _by_hand(model, parameters, batch, loss):
    """Return the loss of each row, and the norm of its gradient, by parameter."""

    def of_row(given, x, y):
        return loss(functional_call(model, given, (x[None],)), y[None])

    losses = vmap(of_row, (None, 0, 0))(parameters, *batch)
    gradients = vmap(grad(of_row), (None, 0, 0))(parameters, *batch)
    return losses.double(), {
        name: each.reshape(len(each), -1).norm(dim=1) for name, each in gradients.items()
    }


def _agree(found, expected):
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_the_gradients_of_single_rows(name, tmp_path):
    torch.manual_seed(0)
    make, data, loss = NETWORKS[name]
    model = make()
    step = _train(tmp_path / "run", model, data(), loss)[STEP]
    rows = step.rows
    assert list(rows.numbers) == step.batch.rows.tolist() and rows.source == "the data"
    losses, norms = _by_hand(model, step.parameters, step.batch, loss)
    _agree(rows.loss, losses)
    assert rows.loss_share.is_mean is (name != "chapter")
    count = len(losses) if rows.loss_share.is_mean else 1
    assert rows.known == list(step.gradients)
    for parameter, expected in norms.items():
        share = rows.gradients[parameter]
        _agree(share.norms, expected / count)
        assert share.rest == 0
        assert share.whole == pytest.approx(float(step.gradients[parameter].norm()))
    together = torch.stack([*norms.values()]).square().sum(0).sqrt()
    _agree(rows.gradient, together / count)


@pytest.mark.parametrize("make", [Recurrent, Pooled])
def test_rows_that_vmap_cannot_tell_apart_are_the_gradients_of_single_rows(make, tmp_path):
    torch.manual_seed(0)
    model, loss = make(), nn.MSELoss()
    step = _train(tmp_path / "run", model, (torch.randn(N, 5, 3), torch.randn(N, 2)), loss)[STEP]
    x, y = step.batch.x, step.batch.y
    model.load_state_dict(step.parameters)
    norms = {name: [] for name in step.gradients}
    for row in range(len(x)):
        model.zero_grad()
        loss(model(x[row : row + 1]), y[row : row + 1]).backward()
        for name, parameter in model.named_parameters():
            norms[name].append(parameter.grad.norm())
    assert step.rows.known == [*step.gradients]
    for name, each in norms.items():
        _agree(step.rows.gradients[name].norms, torch.stack(each) / len(x))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0, 0.1])])
def test_targets_that_are_weighted_or_ignored(weight, tmp_path):
    torch.manual_seed(0)
    x, y = _images()
    y[::3] = 2
    loss, model = nn.CrossEntropyLoss(weight, ignore_index=2), _network(nn.ReLU())
    step = _train(tmp_path / "run", model, (x, y), loss)[STEP]
    each = nn.CrossEntropyLoss(weight, ignore_index=2, reduction="none")
    losses, norms = _by_hand(model, step.parameters, step.batch, lambda out, y: each(out, y).sum())
    y = step.batch.y
    counted = (torch.ones(4) if weight is None else weight)[y][y != 2].sum()
    _agree(step.rows.loss, losses * len(y) / counted)
    for parameter, expected in norms.items():
        _agree(step.rows.gradients[parameter].norms, expected / counted)


def test_a_mean_over_what_counts_divides_by_how_much_counts(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    step = _train(tmp_path / "run", model, _columns(), Masked())[STEP]
    counted = (step.batch.y > 0).sum()
    _, norms = _by_hand(
        model, step.parameters, step.batch, lambda out, y: ((out - y) ** 2 * (y > 0)).sum()
    )
    for parameter, expected in norms.items():
        _agree(step.rows.gradients[parameter].norms, expected / counted)


class Relative(nn.Module):
    """Errors, relative to targets above 0, and terms of the targets alone."""

    def forward(self, out, y):
        positive = (y > 0).float()
        error = ((out - y) ** 2).sum() / (y * positive).sum()
        return error - 0.1 * (y**2).sum() + (y**3).sum() / len(y) + (y * positive).sum() / positive.sum()


def test_terms_of_the_data_alone_are_of_their_rows(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    step = _train(tmp_path / "run", model, _columns(), Relative())[STEP]
    y = step.batch.y.double()
    errors, _ = _by_hand(model, step.parameters, step.batch, lambda out, y: ((out - y) ** 2).sum())
    above = y * (y > 0)
    own = errors / above.sum() - 0.1 * (y**2).sum(1) + (y**3).sum(1) / len(y)
    share = step.rows.loss_share
    _agree(share.norms, own + above.sum(1) / (y > 0).sum())
    assert share.rest == 0


def test_batch_norm_mixes_what_lies_before_it(tmp_path):
    torch.manual_seed(0)
    model = _network(nn.BatchNorm2d(4), nn.ReLU())
    step = _train(tmp_path / "run", model, _images(), nn.CrossEntropyLoss())[STEP]
    rows = step.rows
    for name in ("0.weight", "0.bias"):
        assert "native_batch_norm_backward" in str(rows.gradients[name])
        assert "mixes rows" in str(rows.gradients[name])
    assert rows.known == ["1.weight", "1.bias", "4.weight", "4.bias"]
    torch.testing.assert_close(float(rows.loss.mean()), step.loss)
    inputs, outputs = step.activations["3"], step.activations["4"].clone().requires_grad_()
    nn.functional.cross_entropy(outputs, step.batch.y).backward()
    _agree(rows.gradients["4.weight"].norms, inputs.norm(dim=1) * outputs.grad.norm(dim=1))
    with pytest.raises(RunError, match=r"rows of the gradient of 0\.weight are unknown: operation #\d+"):
        _ = rows.gradient


@pytest.fixture
def loop(tmp_path):
    """Record a loop of two models, and return a step, the models and the optimizer."""
    torch.manual_seed(0)
    x, y = _columns()
    one, two = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)

    def record(body):
        place = tmp_path / "loop"
        with everystep.record(run=place, one=one, two=two, optimizer=optimizer) as recording:
            for batch in recording.steps([(x[i : i + 5], y[i : i + 5]) for i in range(0, N, 5)]):
                recording.log(loss=body(*batch))
        return everystep.open(place)[STEP]

    return record, one, two, optimizer


@pytest.fixture
def step_of(loop):
    """Record a loop with a loss of what both models make of a batch, and of y; return a step."""
    record, one, two, optimizer = loop
    return lambda loss: record(lambda x, y: descend(optimizer, loss(two(one(x)), y)))


def _of_both(step, loop, loss):
    _, one, two, _ = loop

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x):
            return self.two(self.one(x))

    return _by_hand(Both(), step.parameters, step.batch, loss)


def test_a_loop_with_two_models_micro_batches_and_clipping(loop):
    record, one, two, optimizer = loop

    def body(x, y):
        optimizer.zero_grad()
        total = 0
        for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
            loss = ((two(one(x[part])) - y[part]) ** 2).sum() / 5
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_([*one.parameters(), *two.parameters()], 0.01)
        optimizer.step()
        return total

    step = record(body)
    losses, norms = _of_both(step, loop, lambda out, y: ((out - y) ** 2).sum() / 5)
    assert step.rows.numbers == (0, 1, 2, 3, 4) and not step.rows.source
    _agree(step.rows.loss, 5 * losses)  # which is divided by the number of rows: their mean
    for name, expected in norms.items():
        _agree(step.rows.gradients[name].norms, expected)


def test_a_gradient_that_code_copies_and_clips_has_no_rows_of_zeros(loop):
    record, one, two, optimizer = loop
    bias = two.bias

    def body(x, y):
        optimizer.zero_grad()
        loss = ((two(one(x)) - y) ** 2).mean()
        bias.grad = torch.autograd.grad(loss, bias)[0].clone()
        nn.utils.clip_grad_norm_([bias], 0.01)
        optimizer.step()
        return loss

    rows = record(body).rows
    # `_foreach_norm` has no rule, and the clipped gradient is made with it.
    with pytest.raises(RunError, match=r"rows of the gradient of two\.bias are unknown: operation #\d+"):
        rows.gradient_of("two.bias")


def test_a_sum_that_begins_with_zeros_is_of_the_row_that_is_added(loop, step_of):
    step = step_of(lambda out, y: sum((torch.zeros(()) + each.sum()).tanh() for each in out))
    losses, norms = _of_both(step, loop, lambda out, y: out.sum().tanh())
    _agree(step.rows.loss, losses)
    for name, expected in norms.items():
        _agree(step.rows.gradients[name].norms, expected)


def test_a_penalty_belongs_to_no_row(loop, step_of):
    _, _, two, _ = loop
    step = step_of(lambda out, y: ((out - y) ** 2).mean() + 0.1 * (two.weight**2).sum())
    losses, norms = _of_both(step, loop, lambda out, y: ((out - y) ** 2).mean())
    _agree(step.rows.loss, losses)
    weight = step.parameters["two.weight"]
    assert step.rows.loss_share.rest == pytest.approx(float(0.1 * (weight**2).sum()))
    assert step.rows.gradients["two.weight"].rest == pytest.approx(float(0.2 * weight.norm()))
    for name, expected in norms.items():
        _agree(step.rows.gradients[name].norms, expected / 5)


def test_a_loss_of_sums_over_the_data_alone_is_not_of_rows(tmp_path):
    weight = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with everystep.record(run=tmp_path / "sums", optimizer=optimizer) as recording:
        for x in recording.steps([torch.randn(8, 3)]):
            recording.log(loss=descend(optimizer, (weight * x.mean() - 1) ** 2))
    rows = recording.run[1].rows
    assert rows.known == []
    with pytest.raises(RunError, match="loss of each row of step 1 is unknown: no single row"):
        _ = rows.loss


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda e, y: (e @ y.T).log_softmax(1).diagonal().mean(), "numbers of different rows"),
        (lambda e, y: ((e - e.mean(0)) ** 2).mean(), "adds up numbers of several rows"),
        (lambda e, y: torch.softmax(e, 0).square().sum(), "combines numbers of several rows"),
        (lambda e, y: (e.sum(0) * e.sum(0)).sum(), "adds up numbers of several rows"),
        (
            lambda e, y: e[:4].reshape(2, -1).softmax(1).square().sum(),
            "combines numbers of several rows",
        ),
        (lambda e, y: (e * e.roll(1, 0)).mean(), "mixes rows"),
        (lambda e, y: (e - e.flip(0)).square().mean(), "adds up numbers of several rows"),
        (lambda e, y: (torch.eye(len(e)) @ e).square().sum(), "adds up numbers of several rows"),
        (lambda e, y: e.amax(0).sum() + e.std(0).sum(), "combines numbers of several rows"),
        (lambda e, y: torch.cdist(e, y).mean(), "has no rule"),
    ],
)
def test_what_mixes_rows_is_named(step_of, body, why):
    rows = step_of(body).rows
    assert rows.known == []
    assert why in str(rows.loss_share)
    with pytest.raises(RunError, match=r"loss of each row of step 3 is unknown: operation #\d+"):
        _ = rows.loss


@pytest.mark.parametrize(
    ("body", "first", "later"),
    [
        (lambda e: (e - e.mean(0)).tanh().sum(), "mean", "tanh"),
        (lambda e: ((e - e.mean(0)) / (e.var(0) + 1).sqrt()).square().mean(), "mean", "div"),
        (lambda e: (1 - (e[:, :1] - e[:, :1].T)).clamp_min(0).mean(), "sub", "clamp_min"),
        (lambda e: e.square().mean().sqrt(), "mean", "sqrt"),
    ],
)
def test_the_sum_that_first_mixes_rows_is_named_before_what_is_not_linear_in_it(
    step_of, body, first, later
):
    step = step_of(lambda out, y: body(out))
    names = [seen.operation.name for seen in step.operations]
    one_at = names.index(first)
    two_at = names.index(later, one_at)
    called = [f"operation #{at} ({step.operations[at].operation.operator})" for at in (one_at, two_at)]
    expected = f"{called[0]} adds up numbers of several rows, and {called[1]} is not linear in the sum"
    assert {str(each) for each in (step.rows.loss_share, *step.rows.gradients.values())} == {expected}


def test_a_gradient_that_no_number_of_a_row_went_into_is_not_said_to_be_of_no_row(loop, step_of):
    step = step_of(lambda out, y: out.mean())
    _, norms = _of_both(step, loop, lambda out, y: out.mean())
    assert "the same for all rows" in str(step.rows.gradients["two.bias"])
    for name in ("two.weight", "one.0.weight", "one.0.bias"):
        _agree(step.rows.gradients[name].norms, norms[name] / 5)


def _recorded(directory, model, batch, loss_of, scaler=None):
    """Return the first step of a loop, with the model before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {} if scaler is None else {"scaler": scaler}
    with everystep.record(run=directory, model=model, optimizer=optimizer, **parts) as recording:
        for given in recording.steps([batch, batch]):
            optimizer.zero_grad()
            loss = loss_of(model, *given)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
            recording.log(loss=loss)
    step = everystep.open(directory)[1]
    model.load_state_dict(step.parameters)
    return step


def _agrees_by_hand(step, model, loss_of, batch, divisor=None):
    """Compare the norms of the gradients of rows with those of each row alone; divisor: of these."""
    found = {name: [] for name in step.rows.known}
    for row in range(len(batch[0])):
        model.zero_grad()
        loss_of(model, *(part[row : row + 1] for part in batch)).backward()
        for name, parameter in model.named_parameters():
            if name in found:
                found[name].append(parameter.grad.norm().double())
    for name, each in found.items():
        _agree(step.rows.gradients[name].norms, torch.stack(each) / (divisor or len(batch[0])))


def _two_heads(model, x, y):
    out = model(x)
    return nn.functional.softplus(-out[:, 0] * y).mean() + out[:, 1].mean()


def _one_by_one(model, x):
    return sum(-model(row).sum() for row in x) / len(x)


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (nn.Linear(5, 2), (torch.randn(6, 5), torch.randn(6)), _two_heads),
        (nn.Linear(5, 1), (torch.randn(4, 5),), _one_by_one),
        (nn.Linear(5, 1), (torch.randn(1, 5),), lambda model, x: -model(x).mean()),
    ],
)
def test_a_constant_gradient_is_of_no_known_row(model, batch, loss, tmp_path):
    step = _recorded(tmp_path / "run", model, batch, loss)
    assert "the same for all rows" in str(step.rows.gradients["bias"])
    assert step.rows.known == ["weight"]
    _agrees_by_hand(step, model, loss, batch)


_PROTOTYPES = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 9.0]])


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("model", "joined"),
    [
        (nn.Linear(3, 2), lambda x: torch.cat([x, _PROTOTYPES])),
        (nn.LayerNorm(3), lambda x: torch.cat([x, _PROTOTYPES])),
        (nn.Conv1d(1, 2, 2), lambda x: torch.cat([x, _PROTOTYPES])[:, None]),
        (nn.Embedding(6, 2), lambda x: torch.cat([x[:, 0].abs().long(), torch.tensor([2, 3])])),
    ],
)
def test_a_single_row_has_not_made_the_gradient_of_what_was_joined_to_it(model, joined, count, tmp_path):
    batch = (torch.randn(count, 3).clip(-5, 5),)
    step = _recorded(tmp_path / "run", model, batch, lambda model, x: model(joined(x)).pow(3).sum())
    assert step.rows.loss_share.rest
    for reason in step.rows.gradients.values():
        assert "the same for all rows" in str(reason)


class OneNumber(nn.Module):
    """A logistic regression of one number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        sure = nn.functional.logsigmoid
        return -(y * sure(x * self.weight) + (1 - y) * sure(-x * self.weight)).sum()


def _number_by_number(model, x, y):
    return sum(model(x[i], y[i]) for i in range(len(x))) / len(x)


@pytest.mark.parametrize("count", [1, 4])
def test_a_single_number_is_of_its_row(count, tmp_path):
    torch.manual_seed(0)
    model, batch = OneNumber(), (torch.randn(count), torch.rand(count))
    step = _recorded(tmp_path / "run", model, batch, _number_by_number)
    _agrees_by_hand(step, model, _number_by_number, batch)
    assert step.rows.loss_share.rest == step.rows.gradients["weight"].rest == 0


@pytest.mark.parametrize("count", [7, 8])
def test_a_batch_with_the_shape_of_a_parameter(count, tmp_path):
    def loss(model, x, y):
        out = model(x)
        return nn.functional.softplus(out).mean() - (out * y).mean() + 0.3 * out.mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8))
    batch = torch.randn(count, 5), torch.randn(count, 8)
    step = _recorded(tmp_path / "run", model, batch, loss)
    _agrees_by_hand(step, model, loss, batch)
    assert [share.rest for share in step.rows.gradients.values()] == [0] * 4


def _mean_square(model, x, y):
    return ((model(x) - y) ** 2).mean()


def test_gradients_are_those_without_the_scale_of_a_grad_scaler(tmp_path):
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 2), (torch.randn(6, 5), torch.randn(6, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = _recorded(tmp_path / "run", model, batch, _mean_square, scaler)
    assert len(step.rows.known) == 2
    _agrees_by_hand(step, model, _mean_square, batch)


def test_rows_that_are_picked_by_masks_and_classes(tmp_path):
    weights = torch.tensor([0.5, 2.0, 1.0])

    def loss(model, x, y):
        sure = model(x).log_softmax(1)
        chosen = sure[torch.arange(len(y)), y]
        same = sure.gather(1, y[:, None])
        wide = nn.functional.cross_entropy(model(x), y, weight=weights, reduction="sum")
        return (chosen[y > 0] ** 2).sum() + same.square().sum() + wide

    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), (torch.randn(6, 5), torch.tensor([0, 2, 1, 1, 0, 2]))
    step = _recorded(tmp_path / "run", model, batch, loss)
    assert len(step.rows.known) == 2
    _agrees_by_hand(step, model, loss, batch, divisor=1)


def test_a_gradient_that_cancels_but_for_rounding_is_known(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[:] = model[0].weight[:1]  # so that all it makes is the same, and normalized away
        model[0].bias[:] = model[0].bias[:1]
    step = _recorded(tmp_path / "run", model, (torch.randn(6, 5), torch.randn(6, 2)), _mean_square)
    assert step.rows.known == [*step.gradients]
    assert float(step.rows.gradient.min()) > 0


def test_tensors_of_a_batch_that_share_numbers_of_different_rows():
    torch.manual_seed(0)
    series, model = torch.randn(9, 4), nn.Linear(4, 4)
    batches = [(series[:-1], series[1:])] * 2
    step = looped(model, batches, lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean())[2]
    losses, norms = _by_hand(model, step.parameters, step.batch, nn.MSELoss())
    if isinstance(step.rows.loss_share, Share):  # each tensor was laid in memory of its own
        _agree(step.rows.loss, losses)
        _agree(step.rows.gradients["weight"].norms, norms["weight"] / 8)
    else:
        assert "share memory" in str(step.rows.loss_share)
        assert "share memory" in str(step.rows.gradients["weight"])


def test_a_row_with_nan_is_the_first(tmp_path):
    torch.manual_seed(0)
    x, y = _columns()
    x[11, 2] = torch.nan
    run = _train(tmp_path / "run", nn.Linear(6, 3), (x, y), nn.MSELoss(), steps=1, batch_size=None)
    rows = run.rows(1)
    assert rows.numbers[rows.ranked(rows.loss)[0]] == 11
    assert rows.loss.isnan().tolist() == [row == 11 for row in range(N)]
    assert rows.gradient.isnan().tolist() == [row == 11 for row in range(N)]


def test_batches_that_are_accumulated_have_no_rows_in_common():
    batches = [[(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(2)]] * 2
    run = looped(
        nn.Linear(6, 3), batches, lambda model, pairs: sum(((model(x) - y) ** 2).sum() for x, y in pairs)
    )
    rows = run.rows(2)
    assert rows.numbers == () and "no operation joins 0.0 and 1.0 of the batch" in str(rows.loss_share)
    assert rows.loss_share == rows.gradients["weight"]


def test_tensors_of_a_pair_have_rows_in_common():
    model, pairs = nn.Linear(6, 3), [((torch.randn(4, 6),), (torch.randn(4, 6),))] * 2
    ((one,), (other,)), far = pairs[0], lambda model, a, b: (model(a) - model(b)).square()
    expected = far(model, one, other).sum(1).detach()
    run = looped(model, pairs, lambda model, pair: far(model, pair[0][0], pair[1][0]).sum())
    _agree(run.rows(1).loss, expected)


def test_the_rows_of_a_loss_that_is_computed_outside_of_the_step_are_unknown(loop):
    record, one, two, optimizer = loop

    def body(x, y):
        optimizer.zero_grad()
        loss = ((two(one(x)) - y) ** 2).sum()
        loss.backward()
        optimizer.step()
        return torch.tensor(loss.item())

    with pytest.raises(RunError, match="has no loss that an operation returned"):
        _ = record(body).rows.loss


def test_batches_without_rows_in_common():
    batches = [(torch.randn(4, 6), torch.randn(3))] * 2
    run = looped(
        nn.Linear(6, 3), batches, lambda model, batch: (model(batch[0]).sum(0) * batch[1]).sum()
    )
    rows = run.rows(2)
    assert rows.numbers == () and "no first axis in common (x (4, 6)" in str(rows.loss_share)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("data", ["table", "digits"])
def test_a_bad_row_ranks_first(data, tmp_path):
    run = trained(data, tmp_path / "run", epochs=3)
    found = planted(run, data, 0, tmp_path / "fork")
    effective = [each for each in found if each.has_effect]
    assert len(effective) >= 3 and all(each.is_first for each in effective)


def test_the_command_ranks_rows_and_says_what_is_unknown(tmp_path):
    torch.manual_seed(0)
    _train(tmp_path / "plain", nn.Linear(6, 3), _columns(), nn.MSELoss())
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    _train(tmp_path / "mixed", model, _columns(), nn.MSELoss())

    def call(*arguments):
        return CliRunner().invoke(app, ["rows", *map(str, arguments)])

    rows = everystep.open("plain")[3].rows
    given = json.loads(call("plain", 3, "--by", "gradient", "--json").stdout)
    ranked = [given["rows"][str(place)] for place in given["orders"]["gradient"]]
    assert [each["gradient"] for each in ranked] == sorted(rows.gradient.tolist(), reverse=True)
    assert sorted(each["row"] for each in ranked) == sorted(rows.numbers)
    text = call("plain", -1, "--first", 2).stdout
    assert "rows by loss" in text and "5 more" in text and "is the mean of these" in text
    assert "of 2 of 2 parameters" in text
    assert "weight, before clipping" in call("plain", 3, "--parameter", "weight").stdout
    text = call("mixed", 3, "--by", "gradient").stdout
    assert "4 of 6 parameters" in text and "0.weight, 0.bias: unknown; operation #" in text
    deep = nn.Sequential(*(nn.Linear(6, 6) for _ in range(9)), nn.BatchNorm1d(6), nn.Linear(6, 3))
    _train(tmp_path / "deep", deep, _columns(), nn.MSELoss())
    text = call("deep", 3, "--by", "gradient").stdout
    assert "2.weight, 2.bias and 12 more: unknown; operation #" in text
    unknown = call("mixed", 3, "--parameter", "0.weight")
    assert unknown.exit_code == 1 and "of the norm" not in unknown.stdout
    assert isinstance(call("plain", 3, "--by", "size").exception, UsageError)
    assert "no gradient of 'nope'" in str(call("plain", 3, "--parameter", "nope").exception)


def test_rows_show_themselves(tmp_path):
    run = _train(tmp_path / "run", nn.Linear(6, 3), _columns(), nn.MSELoss())
    shown = run[2].rows._repr_html_()
    assert "step 2: loss" in shown and "font-family: monospace; white-space: pre;" in shown
    assert run.rows(2)._repr_html_() == shown
    assert "7 rows, loss known, gradients of 2 of 2" in repr(run[2].rows)
    assert isinstance(run[2].rows.gradients["bias"], Share)


def test_expressions_of_rows(tmp_path):
    torch.manual_seed(0)
    run = _train(tmp_path / "run", nn.Linear(6, 3), _columns(), nn.MSELoss())
    measured = run.measure("max(rows.loss) / loss + 0 * mean(gradients['weight'])", progress=False)
    largest = [float(step.rows.loss.max()) / step.loss for step in run]
    assert [*measured.values.values()] == pytest.approx(largest)
    highest = max(float(step.rows.gradient.max()) for step in run)
    found = run.when(f"max(rows.gradient) >= {highest - 1e-9}", "all", progress=False)
    assert [float(run[t].rows.gradient.max()) for t in found.steps] == [highest]
    for refused in (
        "rows",
        "max(previous.rows.loss)",
        "max(rows.loss) + mean(previous.gradients['weight'])",
    ):
        with pytest.raises(ExpressionError, match="rows"):
            run.measure(refused, progress=False)
    with pytest.raises(ExpressionError, match="everystep rows"):
        run.why(2, "rows.loss[0]")
    with pytest.raises(ExpressionError, match=r"rows\.loss is known of the recorded steps only"):
        run.what_if(1, 3, without_rows=[0], by="max(rows.loss)", progress=False)


def test_an_expression_of_rows_that_are_unknown_says_why(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    run = _train(tmp_path / "run", model, _columns(), nn.MSELoss())
    with pytest.raises(RunError, match=r"rows of the gradient of 0\.weight are unknown"):
        run.measure("max(rows.gradient)", progress=False)
    assert len(run.measure("max(rows.loss)", progress=False).values) == 4
