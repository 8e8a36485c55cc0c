"""The ATen operators that a program may call, by name, for torch 2.9 to 2.15.

An operator that is not listed is refused, so that a new operator of a later torch is not used before it
was reviewed. (torch 2.15 added `shallow_copy_data_`, which gives a tensor the memory of another.)

Variants of an operator are allowed, too: in place (`add_`), and of lists (`_foreach_add`). The list
omits operators on tensors that programs do not have (sparse, quantized, nested); operators that use
values of a tensor as memory offsets, or as a duration, without checking them; operators that write to
memory other than their arguments; and kernels that only other operators call.
"""

from __future__ import annotations

import re

__all__ = ["is_allowed"]

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
