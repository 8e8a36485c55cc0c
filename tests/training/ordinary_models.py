"""Ten well-known models as their users write them, small, with ordinary data, losses and optimizers.

Each is written in a style of its own: with a config object, a list of layers, class attributes, keyword
arguments, helper functions, whatever is usual for its kind. The benchmark
`python -m benchmarks.ordinary_models` trains them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (as everyone writes it)
from tests.training.by_hand import Made
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

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


# A multilayer perceptron.


class MLP(nn.Module):
    def __init__(self, in_features: int, hidden: list[int], num_classes: int, dropout: float = 0.2):
        super().__init__()
        sizes = [in_features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


def pictures(channels: int, size: int, count: int = 10, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Return x (rows, channels, size, size), and the class of each."""
    return torch.randn(rows, channels, size, size), torch.randint(count, (rows,))


# A convolutional network with residuals.


class Residual(nn.Module):
    """Adds to its input what some layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResidualCNN(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2, num_classes: int = 10):
        super().__init__()
        self.stem = self.conv_block(3, width)
        self.body = nn.Sequential(*[self.stage(width) for _ in range(depth)])
        self.classifier = nn.Linear(width, num_classes)

    @staticmethod
    def conv_block(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )

    def stage(self, width: int) -> nn.Sequential:
        block = Residual(self.conv_block(width, width), self.conv_block(width, width))
        return nn.Sequential(block, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.stem(x))
        return self.classifier(features.mean(dim=(2, 3)))


# A variational autoencoder. Its target is the picture itself.


class VAE(nn.Module):
    def __init__(self, input_dim: int = 64, hidden_dim: int = 32, latent_dim: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.ReLU())
        self.fc_mu = nn.Linear(hidden_dim, latent_dim)
        self.fc_logvar = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, input_dim)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return self.fc_mu(h), self.fc_logvar(h)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mu
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x.flatten(start_dim=1))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


def vae_loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor, beta: float = 1.0) -> Tensor:
    recon, mu, logvar = output
    bce = F.binary_cross_entropy(recon, target.flatten(start_dim=1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (bce + beta * kld) / target.size(0)


def grey_pictures() -> tuple[Tensor, Tensor]:
    """Return x (32, 1, 8, 8) from 0 to 1, twice."""
    x = torch.rand(32, 1, 8, 8)
    return x, x.clone()


# A generative transformer.


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 30
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.1
    bias: bool = False

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class LayerNorm(nn.Module):
    """With an optional bias."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError("n_embd must be a multiple of n_head")
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        mask = torch.tril(torch.ones(config.block_size, config.block_size, dtype=torch.bool))
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        cfg = self.config
        q, k, v = (
            part.view(B, T, cfg.n_head, cfg.head_size).transpose(1, 2)
            for part in self.qkv(x).split(cfg.n_embd, dim=-1)
        )
        att = (q @ k.transpose(-2, -1)) / math.sqrt(cfg.head_size)
        att = att.masked_fill(~self.mask[:, :, :T, :T], float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.proj(y))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = nn.ModuleDict(
            {
                "fc": nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
                "act": nn.GELU(),
                "proj": nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
                "drop": nn.Dropout(config.dropout),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m["drop"](m["proj"](m["act"](m["fc"](self.ln_2(x)))))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tok_emb.weight = self.head.weight  # tied
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor) -> Tensor:
        _, t = idx.size()
        assert t <= self.config.block_size, f"cannot look at {t} tokens, only {self.config.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.drop(self.tok_emb(idx) + self.pos_emb(pos))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


def text() -> tuple[Tensor, Tensor]:
    """Return x (16, 12), and y, the same one token later; the last is not there."""
    tokens = torch.randint(30, (16, 12))
    return tokens, torch.cat([tokens[:, 1:], torch.full((16, 1), -1)], dim=1)


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


# A ResNet, written out.


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    expansion: int = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock], layers: list[int], num_classes: int, width: int = 4):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for number, blocks in enumerate(layers, start=1):
            planes = width * 2 ** (number - 1)
            stride = 1 if number == 1 else 2
            setattr(self, f"layer{number}", self._make_layer(block, planes, blocks, stride))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(
        self, block: type[BasicBlock], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        layers += [block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


# A tagger of words.

PAD = 0


class LSTMTagger(nn.Module):
    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int, tagset_size: int):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.word_embeddings = nn.Embedding(vocab_size, embedding_dim, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.hidden2tag = nn.Linear(hidden_dim, tagset_size)

    def init_hidden(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (2, batch, self.hidden_dim // 2)
        return torch.zeros(*shape, device=device), torch.zeros(*shape, device=device)

    def forward(self, sentence: Tensor) -> Tensor:
        embeds = self.dropout(self.word_embeddings(sentence))
        lstm_out, _ = self.lstm(embeds, self.init_hidden(len(sentence), sentence.device))
        return F.log_softmax(self.hidden2tag(lstm_out), dim=-1)


def tag_loss(scores: Tensor, tags: Tensor) -> Tensor:
    return F.nll_loss(scores.permute(0, 2, 1), tags, ignore_index=PAD)


def sentences() -> tuple[Tensor, Tensor]:
    """Return x (24, 9) of words and y (24, 9) of their tags, both 0 after the sentence's end."""
    words, tags = torch.randint(1, 40, (24, 9)), torch.randint(1, 6, (24, 9))
    is_there = torch.arange(9) < torch.randint(4, 10, (24, 1))
    return words * is_there, tags * is_there


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
        "MLP",
        model=lambda: MLP(64, [32, 16], num_classes=10),
        data=lambda: pictures(1, 8),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(AdamW, lr=1e-2),
        batch_size=12,
    ),
    OrdinaryModel(
        "CNN with residuals",
        model=ResidualCNN,
        data=lambda: pictures(3, 12),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        batch_size=16,
    ),
    OrdinaryModel(
        "VAE",
        model=VAE,
        data=grey_pictures,
        loss=vae_loss,
        optimizer=partial(AdamW, lr=3e-3),
    ),
    OrdinaryModel(
        "GPT",
        model=lambda: GPT(GPTConfig()),
        data=text,
        loss=next_token_loss,
        optimizer=partial(AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        batch_size=8,
    ),
    OrdinaryModel(
        "U-Net",
        model=lambda: UNet(n_channels=3, n_classes=1),
        data=masks,
        loss=DiceBCELoss(),
        optimizer=partial(AdamW, lr=1e-3),
        batch_size=4,
    ),
    OrdinaryModel(
        "ResNet",
        model=lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10),
        data=lambda: pictures(3, 32, rows=8),
        loss=F.cross_entropy,
        optimizer=partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    ),
    OrdinaryModel(
        "LSTM tagger",
        model=lambda: LSTMTagger(vocab_size=40, embedding_dim=12, hidden_dim=16, tagset_size=6),
        data=sentences,
        loss=tag_loss,
        optimizer=partial(SGD, lr=0.5),
        batch_size=12,
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
