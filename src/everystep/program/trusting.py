"""Torch kernels that trust their arguments, and the signatures that everystep knows.

`soundness` checks on their behalf. It knows their arguments by position and kind, and by the names
listed here, which torch may change: `aten._cdist_backward` calls its first argument `grad` up to torch
2.14, and `grad_output` since. A kernel with arguments of other kinds is refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = [
    "FORWARD",
    "KEPT_OF_ATTENTION",
    "OF_BACKWARD_ALONE",
    "RENAMED",
    "known_names",
    "what_is_unknown",
]

_PRODUCT = "_scaled_dot_product_"
_ATTENTION = f"{_PRODUCT}flash_attention_for_cpu"
#: The places of the results that the backward pass of attention on a GPU receives.
KEPT_OF_ATTENTION = {
    f"{_PRODUCT}flash_attention": (0, 1, 2, 3, 6, 7),
    f"{_PRODUCT}efficient_attention": (0, 1, 2, 3),
    f"{_PRODUCT}cudnn_attention": (0, 1, 6, 7, 2, 3),
    f"{_PRODUCT}fused_attention_overrideable": (0, 1, 2, 3, 6, 7),
}
#: Kernels that trust tensors kept by the forward pass: the operator of the forward pass (where it is not
#: `name` or `name_forward` of `name_backward`), and the first of its results that they receive.
FORWARD: dict[str, tuple[str, int]] = {
    "_embedding_bag_per_sample_weights_backward": ("_embedding_bag", 1),
    "_pdist_backward": ("_pdist", 0),
    f"{_ATTENTION}_backward": (_ATTENTION, 0),
    "embedding_dense_backward": ("embedding", 1),
    "mkldnn_rnn_layer_backward": ("mkldnn_rnn_layer", 0),
    **{f"{name}_backward": (name, 0) for name in KEPT_OF_ATTENTION},
} | {
    f"{name}_backward": (name, 1)
    for name in (
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("avg_pool2d", "avg_pool3d", "convolution", "_embedding_bag", "fractional_max_pool2d"),
        *("fractional_max_pool3d", "grid_sampler_2d", "grid_sampler_3d", "max_pool2d_with_indices"),
        *("max_pool3d_with_indices", "multi_margin_loss", "multilabel_margin_loss"),
        *("native_batch_norm", "native_group_norm", "native_layer_norm", "nll_loss", "nll_loss2d"),
        *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"),
        *("replication_pad2d", "replication_pad3d", "_weight_norm_interface"),
    )
}
#: Names of parameters of the backward pass, as the forward pass has them.
RENAMED = {
    "mkldnn_rnn_layer_backward": {f"weight{n + 1}": f"weight{n}" for n in range(4)} | {"cx_tmp": "cx_"},
    "_weight_norm_interface_backward": {"saved_v": "v", "saved_g": "g"},
    "native_batch_norm_backward": {"train": "training"},
}
#: Parameters of the backward pass that the forward pass does not have. They must agree with the shapes
#: of the results, or `soundness` checks them.
OF_BACKWARD_ALONE = {"bias_sizes", "num_weights", "output_mask", "grad_input_mask", "max_q", "max_k"}


_ADAM = [
    "List[Tensor] self, List[Tensor] grads, List[Tensor] exp_avgs, List[Tensor] exp_avg_sqs, "
    "List[Tensor] max_exp_avg_sqs, List[Tensor] state_steps, "
    f"{lr} lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, "
    "Optional[Tensor] grad_scale, Optional[Tensor] found_inf"
    for lr in ("float", "Tensor")
]
_BATCH_NORM = "Tensor input, Optional[Tensor] weight, Optional[Tensor] bias, "
_FACTORS = "Tensor factors, Tensor pivots, "
#: The arguments of kernels that trust shapes or numbers, for each overload except `out=`.
_ARGUMENTS: dict[str, list[str]] = {
    "_cdist_backward": ["Tensor grad, Tensor x1, Tensor x2, float p, Tensor cdist"],
    "_embedding_bag": [
        "Tensor weight, Tensor indices, Tensor offsets, bool scale_grad_by_freq, int mode, bool sparse, "
        "Optional[Tensor] per_sample_weights, bool include_last_offset, int padding_idx"
    ],
    "_fft_c2c": ["Tensor self, List[int] dim, int normalization, bool forward"],
    "_fft_c2r": ["Tensor self, List[int] dim, int normalization, int last_dim_size"],
    "_fft_r2c": ["Tensor self, List[int] dim, int normalization, bool onesided"],
    "_fused_adagrad_": [
        "List[Tensor] self, List[Tensor] grads, List[Tensor] state_sums, List[Tensor] state_steps, "
        f"{lr} lr, float lr_decay, float weight_decay, float eps, bool maximize, "
        "Optional[Tensor] grad_scale, Optional[Tensor] found_inf"
        for lr in ("float", "Tensor")
    ],
    "_fused_adam_": _ADAM,
    "_fused_adamw_": _ADAM,
    "_fused_sgd_": [
        "List[Tensor] self, List[Tensor] grads, List[Tensor] momentum_buffer_list, float weight_decay, "
        f"float momentum, {lr} lr, float dampening, bool nesterov, bool maximize, bool is_first_step, "
        "Optional[Tensor] grad_scale, Optional[Tensor] found_inf"
        for lr in ("float", "Tensor")
    ],
    "_log_softmax_backward_data": ["Tensor grad_output, Tensor output, int dim, ScalarType input_dtype"],
    "_native_batch_norm_legit": [
        f"{_BATCH_NORM}Tensor running_mean, Tensor running_var, bool training, float momentum, "
        "float eps",
        f"{_BATCH_NORM}bool training, float momentum, float eps",
    ],
    "_native_batch_norm_legit_no_training": [
        f"{_BATCH_NORM}Tensor running_mean, Tensor running_var, float momentum, float eps"
    ],
    _ATTENTION: [
        "Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, "
        "Optional[Tensor] attn_mask, Optional[float] scale"
    ],
    "_softmax_backward_data": ["Tensor grad_output, Tensor output, int dim, ScalarType input_dtype"],
    "_weight_norm_interface": ["Tensor v, Tensor g, int dim"],
    "linalg_ldl_solve": [f"{_FACTORS}Tensor B, bool hermitian"],
    "linalg_lu_solve": [f"{_FACTORS}Tensor B, bool left, bool adjoint"],
    "lu_unpack": [f"{_FACTORS}bool unpack_data, bool unpack_pivots"],
    "mkldnn_rnn_layer": [
        "Tensor input, Tensor weight0, Tensor weight1, Tensor weight2, Tensor weight3, Tensor hx_, "
        "Tensor cx_, bool reverse, List[int] batch_sizes, int mode, int hidden_size, int num_layers, "
        "bool has_biases, bool bidirectional, bool batch_first, bool train"
    ],
    "native_batch_norm": [
        f"{_BATCH_NORM}Optional[Tensor] running_mean, Optional[Tensor] running_var, bool training, "
        "float momentum, float eps"
    ],
}


def what_is_unknown(operator: Any) -> str | None:
    """Return what is unknown about a trusting kernel, None if everystep knows enough."""
    name = operator.overloadpacket.__name__
    if name in _ARGUMENTS and known_names(operator) is None:
        return f"has another signature in torch {torch.__version__} than this everystep supports"
    if name in FORWARD:
        base, renamed = FORWARD[name][0], RENAMED.get(name, {})
        known = _names_of(base) | _names_of(f"{base}_forward") | OF_BACKWARD_ALONE
        for argument in _given(operator):
            is_tensor = "Tensor" in str(argument.real_type)
            if not is_tensor and renamed.get(argument.name, argument.name) not in known:
                return (
                    f"takes {argument.name} in torch {torch.__version__}, which this everystep does "
                    f"not support: {base} has no such argument"
                )
    return None


@cache
def known_names(operator: Any) -> dict[str, str] | None:
    """Return everystep's names for the arguments of a kernel, by torch's names.

    None if the arguments are unknown; for a kernel that does not trust shapes, the names are torch's
    own.
    """
    given = _given(operator)
    signatures = _ARGUMENTS.get(operator.overloadpacket.__name__)
    if signatures is None:
        return {argument.name: argument.name for argument in given}
    kinds = [str(argument.real_type) for argument in given]
    for signature in signatures:
        pairs = [argument.split() for argument in signature.split(", ")]
        if [kind for kind, _ in pairs] == kinds:
            return {argument.name: ours for argument, (_, ours) in zip(given, pairs, strict=True)}
    return None


def _given(operator: Any) -> list[Any]:
    """Return the arguments of an operator in the order of its schema, without those of `out=`."""
    return [argument for argument in operator._schema.arguments if not argument.is_out]


def _names_of(name: str) -> set[str]:
    packet = getattr(torch.ops.aten, name, None)
    overloads = (getattr(packet, each) for each in packet.overloads()) if packet else ()
    return {argument.name for overload in overloads for argument in overload._schema.arguments}
