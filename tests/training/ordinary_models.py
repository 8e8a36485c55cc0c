"""Four well-known models as their users write them, small, with ordinary data, losses and optimizers.

Each is written in a style of its own: with helper functions, nested
modules, keyword arguments, whatever is usual for its kind. The benchmark
`python -m benchmarks.ordinary_models` trains them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (as everyone writes it)
from tests.training.by_hand import Made
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

__all__ = ["ORDINARY_MODELS", "OrdinaryModel"]


@dataclass(frozen=True)
class OrdinaryModel:
    """A model, its data, its loss and its optimizer."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor]
    optimizer: Callable[[Any], Optimizer]
    batch_size: int | None = None

    def make(self) -> Made:
        """Return new objects; the same numbers at every call."""
        torch.manual_seed(0)
        x, y = self.data()
        model = self.model()
        return Made(model, x, y, self.loss, self.optimizer(model.parameters()))


def pictures(channels: int, size: int, count: int = 10, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Return x (rows, channels, size, size), and the class of each."""
    return torch.randn(rows, channels, size, size), torch.randint(count, (rows,))


# A U-Net.


def double_conv(in_ch: int, out_ch: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_ch, out_ch):
        layers += [
            nn.Conv2d(channels, out_ch, kernel_size=3, padding=1),
            nn.GroupNorm(2, out_ch),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class Up(nn.Module):
    def __init__(self, in_ch: int, out_ch: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_ch, in_ch // 2, kernel_size=2, stride=2)
        self.conv = double_conv(in_ch, out_ch)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self, n_channels: int, n_classes: int, features: tuple[int, ...] = (4, 8, 16)):
        super().__init__()
        self.inc = double_conv(n_channels, features[0])
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        for smaller, larger in pairwise(features):
            self.downs.append(nn.Sequential(nn.MaxPool2d(2), double_conv(smaller, larger)))
            self.ups.insert(0, Up(larger, smaller))
        self.outc = nn.Conv2d(features[0], n_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)


def masks() -> tuple[Tensor, Tensor]:
    """Return x (8, 3, 18, 18), and y (8, 1, 18, 18) of zeros and ones."""
    x = torch.randn(8, 3, 18, 18)
    return x, (x.mean(dim=1, keepdim=True) > 0).float()


class DiceBCELoss(nn.Module):
    def __init__(self, smooth: float = 1.0):
        super().__init__()
        self.smooth = smooth
        self.bce = nn.BCEWithLogitsLoss()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = torch.sigmoid(inputs).reshape(-1)
        flat = targets.reshape(-1)
        intersection = (probabilities * flat).sum()
        dice = (2.0 * intersection + self.smooth) / (probabilities.sum() + flat.sum() + self.smooth)
        return self.bce(inputs, targets) + 1 - dice


# A network on a graph: the rows of x are its nodes.


class GraphConv(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.lin_self = nn.Linear(in_dim, out_dim)
        self.lin_neigh = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        src, dst = edge_index
        messages = x[src]
        summed = torch.zeros_like(x).index_add_(0, dst, messages)
        ones = torch.ones(dst.shape[0], dtype=x.dtype, device=x.device)
        degree = x.new_zeros(x.size(0)).index_add(0, dst, ones).clamp(min=1)
        return self.lin_self(x) + self.lin_neigh(summed / degree.unsqueeze(-1))


class GNN(nn.Module):
    def __init__(self, edge_index: Tensor, dims: tuple[int, ...], p: float = 0.5):
        super().__init__()
        self.register_buffer("edge_index", edge_index)
        self.convs = nn.ModuleList([GraphConv(i, o) for i, o in pairwise(dims)])
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x, self.edge_index)
            if i < len(self.convs) - 1:
                x = F.dropout(F.elu(x), p=self.p, training=self.training)
        return x


def gnn() -> nn.Module:
    return GNN(torch.randint(30, (2, 120)), dims=(12, 16, 5))


# A vision transformer.


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 2, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim * mult),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim * mult, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.ff = FeedForward(dim, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        attended, _ = self.attn(h, h, h, need_weights=False)
        x = x + attended
        return x + self.ff(x)


class ViT(nn.Module):
    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        channels: int = 3,
        dropout: float = 0.1,
    ):
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.to_patches = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, num_patches + 1, dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.Sequential(*(EncoderLayer(dim, heads, dropout) for _ in range(depth)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patches(img).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        cls_tokens = self.cls_token.expand(b, -1, -1)
        x = torch.cat((cls_tokens, x), dim=1)
        x = self.dropout(x + self.pos_embedding[:, : n + 1])
        return self.mlp_head(self.transformer(x)[:, 0])


# A siamese network: every row of x is a pair, and y says whether both are of a kind.


class SiameseNet(nn.Module):
    def __init__(self, embedding_net: nn.Module):
        super().__init__()
        self.embedding_net = embedding_net

    def get_embedding(self, x: Tensor) -> Tensor:
        return F.normalize(self.embedding_net(x), p=2, dim=1)

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        left, right = pairs.unbind(dim=1)
        return self.get_embedding(left), self.get_embedding(right)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = margin

    def forward(self, outputs: tuple[Tensor, Tensor], same: Tensor) -> Tensor:
        distance = F.pairwise_distance(*outputs)
        positive = same * distance.pow(2)
        negative = (1 - same) * torch.clamp(self.margin - distance, min=0.0).pow(2)
        return 0.5 * torch.mean(positive + negative)


def siamese() -> nn.Module:
    layers = nn.Conv1d(1, 4, 3), nn.PReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(28, 6)
    return SiameseNet(nn.Sequential(*layers))


def pairs() -> tuple[Tensor, Tensor]:
    """Return x (20, 2, 1, 16), and y (20), 1 for pairs of a kind."""
    return torch.randn(20, 2, 1, 16), torch.randint(2, (20,)).float()


ORDINARY_MODELS = [
    OrdinaryModel(
        "U-Net",
        model=lambda: UNet(n_channels=3, n_classes=1),
        data=masks,
        loss=DiceBCELoss(),
        optimizer=partial(AdamW, lr=1e-3),
        batch_size=4,
    ),
    OrdinaryModel(
        "GNN",
        model=gnn,
        data=lambda: (torch.randn(30, 12), torch.randint(5, (30,))),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(AdamW, lr=1e-2, weight_decay=5e-4),
    ),
    OrdinaryModel(
        "ViT",
        model=lambda: ViT(image_size=12, patch_size=4, num_classes=10, dim=16, depth=2, heads=4),
        data=lambda: pictures(3, 12),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(AdamW, lr=1e-3, weight_decay=0.05),
        batch_size=16,
    ),
    OrdinaryModel(
        "siamese net",
        model=siamese,
        data=pairs,
        loss=ContrastiveLoss(margin=1.0),
        optimizer=partial(AdamW, lr=1e-3),
        batch_size=10,
    ),
]
