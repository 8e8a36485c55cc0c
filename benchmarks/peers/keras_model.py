"""Keras on its torch backend: a model of Keras' own layers, losses and optimizers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported

import keras

from benchmarks.peers import Training
from benchmarks.workloads import Convolutional, Network, Perceptron, Start, Transformer, Workload

__all__ = ["prepare"]


def prepare(workload: Workload, folder: Path) -> Training:
    """Return the training from `compile` to the losses; the model is built before."""
    start = workload.make()
    losses: list[Tensor] = []
    model = _model(workload, start, losses)

    def train() -> list[float]:
        model.compile(optimizer=_optimizer(workload), loss=_loss(workload), jit_compile=False)
        for x, y in workload.batches(start.x, start.y):
            model.train_on_batch(x, y)
        # Before the first step, Keras computes a loss without numbers to find out shapes.
        return [loss.item() for loss in losses[-workload.steps :]]

    return train


def _loss(workload: Workload) -> Any:
    if workload.data == "digits":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return lambda y, prediction: keras.ops.sum(keras.ops.square(prediction - y))


def _optimizer(workload: Workload) -> Any:
    match workload.update:
        case "gradient descent":
            return keras.optimizers.SGD(workload.lr)
        case "Adam":
            return keras.optimizers.Adam(workload.lr, epsilon=1e-8)
        case "AdamW":
            return keras.optimizers.AdamW(workload.lr, epsilon=1e-8, weight_decay=1e-2)


def _model(workload: Workload, start: Start, losses: list[Tensor]) -> Any:
    """Return the network with the start's parameters; every loss is appended to `losses`."""
    sample = keras.Input(tuple(start.x.shape[1:]))
    output = sample
    for layer in _layers(workload.network):
        output = layer(output)

    class Recording(keras.Model):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*arguments, **keywords)
            losses.append(loss.detach())
            return loss

    model = Recording(sample, output)
    model.set_weights([np.ascontiguousarray(w.detach().numpy()) for w in _weights(start.model)])
    return model


def _layers(network: Network) -> Iterator[Any]:
    match network:
        case Perceptron(sizes=sizes):
            for outputs in sizes[1:-1]:
                yield keras.layers.Dense(outputs, activation="relu")
            yield keras.layers.Dense(sizes[-1])
        case Convolutional(channels=channels, classes=classes):
            layout = {"padding": "same", "data_format": "channels_first"}
            for count in channels:
                yield keras.layers.Conv2D(count, 3, activation="relu", **layout)
            yield keras.layers.MaxPooling2D(2, data_format="channels_first")
            # Its "channels_first" would move the channels last, and with them the weights after it.
            yield keras.layers.Flatten(data_format="channels_last")
            yield keras.layers.Dense(classes)
        case Transformer():
            yield keras.layers.Dense(network.width)
            for _ in range(network.layers):
                yield partial(_encoder_layer, network)
            yield keras.layers.Flatten()
            yield keras.layers.Dense(network.classes)


def _encoder_layer(network: Transformer, x: Any) -> Any:
    """Apply the parts of nn.TransformerEncoderLayer, with its epsilon of 1e-5."""
    attention = keras.layers.MultiHeadAttention(network.heads, network.width // network.heads)
    x = keras.layers.LayerNormalization(epsilon=1e-5)(x + attention(x, x))
    inner = keras.layers.Dense(network.feedforward, activation="relu")(x)
    return keras.layers.LayerNormalization(epsilon=1e-5)(x + keras.layers.Dense(network.width)(inner))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield torch's parameters in the order and the layouts of Keras."""
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            yield from (layer.weight.T, layer.bias)
        elif isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            yield from (layer.weight.permute(2, 3, 1, 0), layer.bias)
        elif isinstance(layer, nn.TransformerEncoderLayer):
            yield from _attention_weights(layer.self_attn)
            yield from (layer.norm1.weight, layer.norm1.bias)
            yield from (layer.linear1.weight.T, layer.linear1.bias)
            yield from (layer.linear2.weight.T, layer.linear2.bias)
            yield from (layer.norm2.weight, layer.norm2.bias)


def _attention_weights(attention: nn.MultiheadAttention) -> Iterator[Tensor]:
    """Yield query, key and value apart, which torch packs into one, with an axis of heads."""
    width, heads = attention.embed_dim, attention.num_heads
    packed = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for weight, bias in zip(*packed, strict=True):
        yield from (weight.T.reshape(width, heads, -1), bias.reshape(heads, -1))
    yield from (attention.out_proj.weight.T.reshape(heads, -1, width), attention.out_proj.bias)
