"""The networks as functions of a dict of parameters, named as torch names them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from benchmarks.workloads import Convolutional, Network, Perceptron, Transformer

__all__ = ["forward", "parameters_of"]

Parameters = dict[str, Any]


def parameters_of(model: nn.Module) -> Parameters:
    """Return a copy of torch's parameters, linear weights as (inputs, outputs), as JAX has them."""
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: jnp.array((p.T if p.ndim == 2 else p).numpy()) for name, p in named}


def forward(network: Network, parameters: Parameters, x: Any) -> Any:
    """Return the network's output; the numbers are the layers' places in torch's Sequential."""
    match network:
        case Perceptron(sizes=sizes):
            last = 2 * (len(sizes) - 2)
            for place in range(0, last, 2):
                x = jax.nn.relu(_linear(parameters, f"{place}.", x))
            return _linear(parameters, f"{last}.", x)
        case Convolutional():
            x = jax.nn.relu(_convolution(parameters, "0.", x))
            x = jax.nn.relu(_convolution(parameters, "2.", x))
            window = (1, 1, 2, 2)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
            return _linear(parameters, "6.", x.reshape(len(x), -1))
        case Transformer(layers=layers, heads=heads):
            x = _linear(parameters, "0.", x)
            for place in range(1, 1 + layers):
                x = _encoder_layer(parameters, f"{place}.", heads, x)
            return _linear(parameters, f"{layers + 2}.", x.reshape(len(x), -1))


def _linear(parameters: Parameters, prefix: str, x: Any) -> Any:
    return x @ parameters[prefix + "weight"] + parameters[prefix + "bias"]


def _convolution(parameters: Parameters, prefix: str, x: Any) -> Any:
    layout = ("NCHW", "OIHW", "NCHW")
    weight, bias = parameters[prefix + "weight"], parameters[prefix + "bias"]
    convolved = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=layout)
    return convolved + bias[:, None, None]


def _encoder_layer(parameters: Parameters, prefix: str, heads: int, x: Any) -> Any:
    """The parts of nn.TransformerEncoderLayer, normalized after each; x is (N, sequence, width)."""
    packed = x @ parameters[prefix + "self_attn.in_proj_weight"]
    packed = packed + parameters[prefix + "self_attn.in_proj_bias"]
    query, key, value = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(packed, 3, axis=-1))
    attended = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = x + _linear(parameters, prefix + "self_attn.out_proj.", attended)
    x = _layer_norm(parameters, prefix + "norm1.", x)
    inner = jax.nn.relu(_linear(parameters, prefix + "linear1.", x))
    x = x + _linear(parameters, prefix + "linear2.", inner)
    return _layer_norm(parameters, prefix + "norm2.", x)


def _layer_norm(parameters: Parameters, prefix: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return scaled * parameters[prefix + "weight"] + parameters[prefix + "bias"]
