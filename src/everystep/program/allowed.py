"""The ATen operators that a program may call, by name, for torch 2.9 to 2.15.

An operator that is not listed is refused, so that a new operator of a later torch is not used before it
was reviewed. (torch 2.15 added `shallow_copy_data_`, which gives a tensor the memory of another.)

Variants of an operator are allowed, too: in place (`add_`), and of lists (`_foreach_add`). The list
omits operators on tensors that programs do not have (sparse, quantized, nested); operators that use
values of a tensor as memory offsets, or as a duration, without checking them; operators that write to
memory other than their arguments; and kernels that only other operators call.

Some kernels trust their arguments, and `soundness` checks on their behalf. It knows these by position
and kind, and by the names listed here, which torch may change: `aten._cdist_backward` calls its first
argument `grad` up to torch 2.14, and `grad_output` since. A kernel with arguments of other kinds is
refused.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch

__all__ = [
    "FORWARD",
    "KEPT_OF_ATTENTION",
    "OF_BACKWARD_ALONE",
    "RENAMED",
    "is_allowed",
    "known_names",
    "what_is_unknown",
]

#: With the derivative of those with a star: `mish*` is `mish` and `mish_backward`.
_NAMES = """
_adaptive_avg_pool2d* _adaptive_avg_pool3d* _addmm_activation _cdist_backward _cdist_forward _conj
_conj_physical _convolution _cudnn_rnn* _dirichlet_grad _embedding_bag* _embedding_bag_forward_only
_embedding_bag_per_sample_weights_backward _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _foreach_powsum
_fused_adagrad_ _fused_adam_ _fused_adamw_ _fused_dropout _fused_rms_norm* _fused_sgd_ _grouped_mm
_is_all_true _is_any_true _linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet _linalg_solve_ex
_linalg_svd _log_softmax _log_softmax_backward_data _native_batch_norm_legit
_native_batch_norm_legit_no_training _neg_view _pdist_backward _pdist_forward _prelu_kernel*
_reshape_alias _safe_softmax _sample_dirichlet _scaled_dot_product_attention_math_for_mps
_scaled_dot_product_cudnn_attention* _scaled_dot_product_efficient_attention*
_scaled_dot_product_flash_attention* _scaled_dot_product_flash_attention_for_cpu*
_scaled_dot_product_fused_attention_overrideable* _softmax _softmax_backward_data _standard_gamma
_standard_gamma_grad _thnn_fused_gru_cell* _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl
_to_copy _trilinear _unsafe_view _upsample_bicubic2d_aa* _upsample_bilinear2d_aa*
_upsample_lanczos2d_aa* _upsample_nearest_exact1d* _upsample_nearest_exact2d*
_upsample_nearest_exact3d* _weight_norm_interface* abs acos acosh adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d* adaptive_max_pool3d* add addbmm addcdiv
addcmul addmm addmv addr affine_grid_generator alias all amax amin aminmax angle any arange argmax
argmin as_strided asin asinh atan atan2 atanh avg_pool1d avg_pool2d* avg_pool3d* baddbmm
bartlett_window bernoulli binary_cross_entropy* binary_cross_entropy_with_logits binomial bitwise_and
bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag
bmm bucketize cat cauchy ccol_indices ceil celu channel_shuffle cholesky cholesky_inverse
cholesky_solve chunk clamp clamp_max clamp_min clone col2im col_indices complex conj_physical
constant_pad_nd conv_tbc convolution* copy copysign cos cosh count_nonzero crow_indices
cudnn_batch_norm* cudnn_grid_sampler* cummax cummin cumprod cumsum deg2rad detach diag_embed diagonal*
diagonal_scatter digamma dist div dot elu* embedding embedding_dense_backward embedding_renorm empty
empty_like empty_strided eq erf erfc erfinv exp exp2 expand expm1 exponential eye
fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask fft_fftfreq
fft_rfftfreq fill flip floor floor_divide fmax fmin fmod frac fractional_max_pool2d*
fractional_max_pool3d* frexp full full_like gather gcd ge gelu* geometric geqrf glu* grid_sampler_2d*
grid_sampler_3d* gt hamming_window hann_window hardshrink* hardsigmoid* hardswish* hardtanh*
hash_tensor heaviside histc huber_loss* hypot i0 igamma igammac im2col index index_add index_copy
index_fill index_put index_reduce index_select indices isin isinf isnan isneginf isposinf kaiser_window
kthvalue lcm ldexp le leaky_relu* lerp lgamma lift_fresh linalg__powsum linalg_cholesky_ex linalg_cross
linalg_eig linalg_eigvals linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex
linalg_ldl_solve linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp
linalg_matrix_sqrth linalg_pinv linalg_polar linalg_qr linalg_solve_triangular linalg_vector_norm
linear* linspace log log10 log1p log2 log_normal log_sigmoid_backward log_sigmoid_forward log_softmax
logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit* logspace
logsumexp lstm_mps_backward lt lu_unpack masked_fill masked_scatter* matmul max max_pool2d*
max_pool2d_with_indices* max_pool3d_with_indices* max_unpool2d max_unpool3d maximum mean median min
minimum miopen_batch_norm* miopen_rnn* mish* mkldnn_rnn_layer* mm mode mps_convolution_backward
mps_convolution_transpose_backward mse_loss* mul multi_margin_loss* multilabel_margin_loss_backward
multilabel_margin_loss_forward multinomial mv mvlgamma nan_to_num nanmedian nansum narrow narrow_copy
native_batch_norm* native_channel_shuffle native_dropout* native_group_norm* native_layer_norm* ne neg
new_empty new_empty_strided new_full new_ones new_zeros nextafter nll_loss2d_backward
nll_loss2d_forward nll_loss_backward nll_loss_forward norm normal normal_functional ones ones_like
ormqr permute pixel_shuffle pixel_unshuffle poisson polar polygamma pow prod put rad2deg rand rand_like
randint randint_like randn randn_like random randperm range reciprocal reflection_pad1d*
reflection_pad2d* reflection_pad3d* relu remainder renorm repeat replication_pad1d* replication_pad2d*
replication_pad3d* roll rot90 round row_indices rrelu_with_noise* rrelu_with_noise_functional rsqrt
rsub scalar_tensor scatter scatter_add scatter_reduce searchsorted select* select_scatter sgn sigmoid*
sign signbit silu* sin sinc sinh slice* slice_inverse smooth_l1_loss* soft_margin_loss* softmax
softplus* softshrink* sort special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0
special_bessel_y1 special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py special_zeta split
split_with_sizes sqrt squeeze stack std std_mean sub sum t take tan tanh* threshold* topk trace
transpose triangular_solve tril tril_indices triu triu_indices trunc unbind unfold* uniform
unsafe_split unsafe_split_with_sizes unsqueeze upsample_bicubic2d* upsample_bilinear2d*
upsample_linear1d* upsample_nearest1d* upsample_nearest2d* upsample_nearest3d* upsample_trilinear3d*
value_selecting_reduction_backward values var var_mean vdot view view_as_complex view_as_real where
xlogy zero zeros zeros_like
"""

_ALLOWED = frozenset(re.sub(r"(\S+)\*", r"\1 \1_backward", _NAMES).split())
_VARIANT = re.compile(r"^_foreach_|(?<=[a-z0-9])_$")


def is_allowed(name: str) -> bool:
    """Return whether a program may call an operator, by its name without an overload."""
    return name in _ALLOWED or _VARIANT.sub("", name) in _ALLOWED


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
