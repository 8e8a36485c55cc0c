"""Modules as people write them, which do nothing but compute."""

import math
from dataclasses import dataclass

import torch
from tests.training.by_hand import momentum, new_training
from tests.training.python_cases.case import Case, Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as people write

__all__ = ["ORDINARY_CASES"]

MODELS = model = Table()

WIDTH = 8
NEGATIVE_SLOPE = 0.1


@model
class ResidualBlock(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block makes of x (N, 4)."""
        h = self.first(x)
        h = h + self.block(self.norm(h))
        return self.last(h)


@model
class SmallCnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = x.view(-1, 1, 2, 2)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        x = F.adaptive_avg_pool2d(x, 1)
        x = torch.flatten(x, 1)
        return self.fc(x)


@dataclass
class GatedConfig:
    inputs: int = 4
    hidden: int = 6
    outputs: int = 2
    bias: bool = False
    dropout: float = 0.1


class Gated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.inputs, config.hidden, bias=config.bias)
        self.up = nn.Linear(config.inputs, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, config.outputs, bias=config.bias)

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        if self.config.dropout > 0:
            h = F.dropout(h, p=self.config.dropout, training=self.training)
        return self.down(h)


@model
def gated_by_a_config():
    return Gated(GatedConfig())


@model
class Attention(nn.Module):
    """Two heads over four tokens of one number each."""

    def __init__(self, width=4, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(1, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x.unsqueeze(-1))
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.reshape(B, T, self.heads, C // self.heads).permute(0, 2, 1, 3)
        k = k.reshape(B, T, self.heads, C // self.heads).permute(0, 2, 1, 3)
        v = v.reshape(B, T, self.heads, C // self.heads).permute(0, 2, 1, 3)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(C // self.heads)
        weights = scores.softmax(dim=-1)
        h = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        h = h.permute(0, 2, 1, 3).reshape(B, T, C)
        return self.out(h).mean(dim=1)


@model
class CausalAttention(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, 2)
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)).bool())

    def forward(self, x):
        x = self.embed(x[:, :, None])
        length = x.size(1)
        q, k, v = self.attend(x).split(x.size(2), dim=2)
        scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
        return self.project(F.softmax(scores, dim=-1) @ v)[:, -1]


@model
class MaskMadeInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.project = nn.Linear(4, 2)

    def forward(self, x):
        h = self.embed(x.unsqueeze(2))
        T = h.shape[1]
        mask = torch.tril(torch.ones(T, T, device=x.device))
        scores = (h @ h.mT).masked_fill(mask == 0, -1e9)
        return self.project(scores.softmax(-1) @ h).mean(1)


@model
class PositionalEmbedding(nn.Module):
    def __init__(self, width=4, longest=10):
        super().__init__()
        position = torch.arange(longest).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(longest, width)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer("table", table)
        self.embed = nn.Linear(1, width)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        h = self.embed(x[..., None]) + self.table[: x.size(1)]
        return self.out(self.dropout(h).mean(dim=1))


@model
class LearnedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(9, 4), nn.Embedding(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.token.weight
        self.out = nn.Linear(9, 2)

    def forward(self, x):
        tokens = (x * 2 + 4).clamp(0, 8).long()
        positions = torch.arange(tokens.shape[1], dtype=torch.long, device=x.device)
        h = self.token(tokens) + self.position(positions)
        return self.out(self.head(h).mean(1))


@model
class LstmTagger(nn.Module):
    def __init__(self, hidden: int = 5):
        super().__init__()
        self.hidden = hidden
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.tag = nn.Linear(hidden, 2)

    def forward(self, x):
        batch = x.size(0)
        start = (torch.zeros(1, batch, self.hidden), torch.zeros(1, batch, self.hidden))
        out, (h, _) = self.lstm(x.unsqueeze(-1), start)
        return self.tag(out[:, -1, :] + h[0])


@model
class Layers(nn.Module):
    """Goes through lists by enumerate, zip, reversed and range."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(depth)])
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = x + layer(norm(x)) / (i + 1)
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        for i in range(len(self.layers)):
            x = x + 0.1 * self.layers[i](x)
        return self.out(x)


@model
class Outputs(nn.Module):
    """Gathers tensors in lists and dicts."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"left": nn.Linear(4, 2), "right": nn.Linear(4, 2)})

    def forward(self, x):
        outputs = {name: head(x) for name, head in self.heads.items()}
        stacked = torch.stack(list(outputs.values()), dim=0)
        both = torch.cat([outputs["left"], outputs["right"]], dim=-1)
        return stacked.mean(0) + sum([part for part in both.chunk(2, dim=-1)])  # noqa: C416


class DictModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.value, self.scale = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.body(x))
        return {"value": self.value(h), "log_scale": self.scale(h).tanh()}


def dict_loss(output, target):
    scale = output["log_scale"].exp()
    return (((output["value"] - target) / scale) ** 2 + output["log_scale"]).mean()


@model
class Autoencoder(nn.Module):
    """Draws, and has methods of its own."""

    def __init__(self, latent=2):
        super().__init__()
        self.encoder = nn.Linear(4, 2 * latent)
        self.decoder = nn.Linear(latent, 2)

    def encode(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def reparameterize(self, mean, log_variance):
        std = torch.exp(0.5 * log_variance)
        eps = torch.randn_like(std)
        return mean + eps * std

    def forward(self, x):
        mean, log_variance = self.encode(x)
        return self.decoder(self.reparameterize(mean, log_variance))


@model
class ScaleByAParameter(nn.Module):
    def __init__(self, in_features=4, out_features=2):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.gain = nn.Parameter(torch.ones(out_features))
        self.register_parameter("bias", None)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.bias is None:
            y = y + 0.1
        return y * self.gain


def swish(x: Tensor, beta: float = 1.0) -> Tensor:
    """Return x times its sigmoid."""
    return x * torch.sigmoid(beta * x)


def rectify(x):
    return torch.where(x > 0, x, NEGATIVE_SLOPE * x)


@model
class HelperFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.second(rectify(swish(self.first(x), beta=1.5)))


@model
class Checked(nn.Module):
    """Asserts shapes, with messages; takes keyword-only arguments."""

    def __init__(self, *, size: int = 4, activation: str = "tanh"):
        super().__init__()
        self.size = size
        self.activation = activation
        self.layer = nn.Linear(size, 2)

    def forward(self, x: Tensor, *, scale: float = 0.5) -> Tensor:
        assert x.ndim == 2, f"x must be (N, D), not {tuple(x.shape)}"
        n, d = x.shape
        assert d == self.size, f"expected {self.size} columns, not {d}"
        if self.activation == "tanh":
            h = torch.tanh(self.layer(x))
        elif self.activation == "relu":
            h = torch.relu(self.layer(x))
        else:
            raise ValueError(f"unknown activation {self.activation}")
        return h.reshape(n, 2) * scale


@model
class Asking(nn.Module):
    """isinstance, getattr with a default, and an attribute that may be None."""

    def __init__(self, pool=None):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2)])
        self.pool = pool

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear) and layer.out_features == 8:
                x = F.gelu(x)
        if self.pool is not None:
            x = self.pool(x)
        return x * getattr(self, "factor", 1.0)


@model
class PropertiesAndStaticMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4) * 0.1)
        self.groups = 2

    @property
    def normalized(self):
        return self.weight / self.weight.norm(dim=1, keepdim=True)

    @property
    def width(self):
        return self.weight.shape[1]

    @staticmethod
    def shuffle(x, groups):
        n, c = x.size()
        return x.view(n, groups, c // groups).transpose(1, 2).reshape(n, c)

    def forward(self, x):
        x = self.shuffle(x, self.groups)
        return x @ self.normalized.t() * math.sqrt(self.width)


class Base(nn.Module):
    hidden = 8

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, self.hidden)

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.features(x)


@model
class Derived(Base):
    """Calls super, a class attribute, and a method that a base class has."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(self.hidden, 2)

    def forward(self, x):
        h = super().forward(x)
        return self.head(h + 0.1 * self.features(-x))


@model
class Windows(nn.Module):
    """Rearranges the batch: rows into windows and back."""

    def __init__(self, window=2):
        super().__init__()
        self.window = window
        self.mix = nn.Linear(2, 2)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        B, D = x.shape
        count = D // self.window
        windows = x.view(B, count, self.window).permute(1, 0, 2).reshape(-1, self.window)
        mixed = self.mix(windows).view(count, B, self.window).permute(1, 0, 2)
        left, right = mixed.contiguous().view(B, -1).split([D // 2, D - D // 2], dim=1)
        return self.out(torch.cat((right, left), dim=1))


@model
class SqueezeAndExcite(nn.Module):
    def __init__(self, channels=4, reduction=2):
        super().__init__()
        self.conv = nn.Conv1d(1, channels, 3, padding="same")
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )
        self.out = nn.Linear(channels, 2)

    def forward(self, x):
        h = self.conv(x.unsqueeze(1))
        b, c, _ = h.size()
        weights = self.fc(h.mean(dim=2)).view(b, c, 1)
        return self.out((h * weights.expand_as(h)).amax(dim=-1))


@model
class GraphConvolution(nn.Module):
    """Adds what neighbours say, by index_add."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))
        self.message, self.update = nn.Linear(1, 4), nn.Linear(5, 2)

    def forward(self, x):
        source, target = self.edges
        nodes = x.t().unsqueeze(-1)
        messages = self.message(nodes[source])
        summed = torch.zeros(nodes.shape[0], nodes.shape[1], 4).index_add_(0, target, messages)
        return self.update(torch.cat([nodes, summed], dim=-1)).mean(dim=0)


class Twin(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward_one(self, x):
        return F.normalize(self.net(x), dim=1)

    def forward(self, x):
        return self.forward_one(x[:, :2]), self.forward_one(x[:, 2:])


def twin_loss(output, target):
    one, two = output
    return F.triplet_margin_loss(one, two, two.roll(1, 0)) + (one - target).pow(2).mean()


@model
class Experts(nn.Module):
    """A mixture, weighed by a gate."""

    def __init__(self, experts=3):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 2) for _ in range(experts)])
        self.gate = nn.Linear(4, experts)

    def forward(self, x):
        weights = torch.softmax(self.gate(x), dim=-1)
        results = [expert(x) for expert in self.experts]
        return torch.sum(weights.unsqueeze(-1) * torch.stack(results, dim=1), dim=1)


@model
class Blocks(nn.Sequential):
    """A sequence that is derived from torch's."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2))

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


@model
class FourierFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        projected = 2 * math.pi * x @ self.frequencies
        return self.out(torch.cat([projected.sin(), projected.cos()], dim=-1))


@model
class NoGradInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            scale = x.std(dim=0, keepdim=True) + 1e-5
        return self.layer(x / scale)


@model
class StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.sigmoid(self.first(x))
        hard = (h > 0.5).to(h.dtype)
        return self.second(hard + h - h.detach())


@model
def the_sequence_of_the_chapter():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _cases():
    for name, kind in MODELS.items():
        for batch_size in (None, 8) if kind in (ResidualBlock, SmallCnn) else (None,):
            rows = "" if batch_size is None else f", {batch_size} rows a step"
            yield Case(
                f"an ordinary module, {name}{rows}",
                lambda at, kind=kind: new_training(kind),
                program=True,
                options={"batch_size": batch_size},
            )
    yield Case(
        "an ordinary module, a dict for a loss",
        lambda at: new_training(DictModel, loss=lambda: dict_loss),
        program=True,
    )
    yield Case(
        "an ordinary module, twins for a loss",
        lambda at: new_training(Twin, loss=lambda: twin_loss),
        program=True,
    )
    yield Case(
        "an ordinary module, two param groups",
        lambda at: new_training(
            ResidualBlock,
            optimizer=lambda parameters: torch.optim.AdamW(
                [{"params": [next(parameters)], "lr": 0.1}, {"params": [*parameters]}], lr=0.01
            ),
        ),
        program=True,
    )
    yield Case(
        "an ordinary module, a step schedule",
        lambda at: new_training(
            ResidualBlock,
            optimizer=momentum,
            schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 23, 0.5),
        ),
        program=True,
    )


ORDINARY_CASES = [*_cases()]
