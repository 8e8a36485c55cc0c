"""Calls of operators of aten, with random numbers: `CASES`, each an operator, arguments and keywords."""

import math

import torch

__all__ = ["CASES", "positive", "rand"]

torch.manual_seed(3)


def rand(*shape):
    return torch.randn(*shape)


def positive(*shape):
    return torch.rand(*shape) + 0.1


def ints(high, *shape):
    return torch.randint(0, high, shape)


def mask(*shape):
    return torch.rand(*shape) > 0.4


CONVOLUTIONS = [
    (rand(2, 4, 7), rand(6, 2, 3), rand(6), [2], [1], [2], False, [0], 2),
    (rand(2, 4, 7, 6), rand(6, 2, 3, 2), None, [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
    (rand(2, 4, 5, 4), rand(4, 3, 3, 2), rand(6), [2, 1], [1, 1], [1, 2], True, [1, 0], 2),
    (rand(1, 2, 4, 4, 4), rand(3, 2, 2, 2, 2), rand(3), [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1),
]


def backward_of(case):
    given, weight, bias, stride, padding, dilation, transposed, extra, groups = case
    settings = stride, padding, dilation, transposed, extra, groups
    output = torch.ops.aten.convolution(given, weight, bias, *settings)
    sizes = [weight.shape[1] * groups if transposed else weight.shape[0]]
    return torch.randn_like(output), given, weight, sizes, *settings, [True, True, True]


def pooled(given, *settings):
    output, indices = torch.ops.aten.max_pool2d_with_indices(given, *settings)
    return torch.randn_like(output), given, *settings, indices


def pooled_in_space(given, kernel):
    output, indices = torch.ops.aten.max_pool3d_with_indices(given, kernel)
    settings = kernel, kernel, [0] * 3, [1] * 3, False
    return torch.randn_like(output), given, *settings, indices


def normalized_layer(given, shape):
    weight, bias = rand(*shape), rand(*shape)
    _, mean, rstd = torch.ops.aten.native_layer_norm(given, shape, weight, bias, 1e-5)
    return torch.randn_like(given), given, shape, mean, rstd, weight, bias, [True] * 3


def normalized_group(given, groups, has_weight):
    rows, channels, *sizes = given.shape
    weight = rand(channels) if has_weight else None
    counts = rows, channels, math.prod(sizes), groups
    _, mean, rstd = torch.ops.aten.native_group_norm(given, weight, None, *counts, 1e-5)
    return torch.randn_like(given), given, mean, rstd, weight, *counts, [True, has_weight, has_weight]


def pooled_adaptively(given, *sizes):
    operator = getattr(torch.ops.aten, f"adaptive_max_pool{len(sizes)}d")
    output, indices = operator(given, list(sizes))
    return torch.randn_like(output), given, indices


def pooled_by_chance(given, kernel, sizes):
    samples = torch.rand(
        given.shape[0] if given.dim() > len(sizes) + 1 else 1, given.shape[-len(sizes) - 1], len(sizes)
    )
    operator = getattr(torch.ops.aten, f"fractional_max_pool{len(sizes)}d")
    output, indices = operator(given, kernel, sizes, samples)
    return torch.randn_like(output), given, kernel, sizes, indices


def labelled(given, target, reduction):
    loss, is_target = torch.ops.aten.multilabel_margin_loss_forward(given, target, reduction)
    return torch.randn_like(loss), given, target, reduction, is_target


def attended(query, key, value, is_causal):
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = operator(query, key, value, 0.0, is_causal)
    return torch.randn_like(output), query, key, value, output, logsumexp, 0.0, is_causal


def recurrent(reverse):
    weights = rand(12, 2), rand(12, 3), rand(12), rand(12)
    return rand(4, 2, 2), *weights, rand(2, 3), rand(2, 3), reverse, [], 2, 3, 1, True, False, True, True


def recurrent_backward(reverse):
    given = recurrent(reverse)
    output, hy, cy, workspace = torch.ops.aten.mkldnn_rnn_layer(*given)
    gradients = rand(4, 2, 3), None, rand(2, 3)
    settings = reverse, 2, 3, 1, True, True, False, [], True
    return *given[:7], output, hy, cy, *gradients, *settings, workspace


def normalized_batch(given, training):
    channels = given.shape[1]
    weight, mean, var = rand(channels), rand(channels), positive(channels)
    _, save_mean, invstd = torch.ops.aten.native_batch_norm(
        given, weight, None, mean.clone(), var.clone(), training, 0.1, 1e-5
    )
    rest = save_mean, invstd, training, 1e-5, [True] * 3
    return torch.randn_like(given), given, weight, mean, var, *rest


def likelihood(given, target, weight, reduction, ignore=-100):
    operator = torch.ops.aten.nll_loss2d_forward if given.dim() == 4 else torch.ops.aten.nll_loss_forward
    loss, total = operator(given, target, weight, reduction, ignore)
    return torch.randn_like(loss), given, target, weight, reduction, ignore, total


ROWS = torch.log_softmax(rand(5, 4), 1)
IMAGES = torch.log_softmax(rand(2, 4, 3, 2), 1)
SOFT = torch.softmax(rand(3, 4, 2), 1)
SIGMOID = rand(3, 4)

LABELS = torch.tensor([[2, -1, 0, 1], [0, 3, 0, -1], [-1, 0, 1, 2]])

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

CASES = [
    ("add.Tensor", (rand(3, 4), rand(4)), {"alpha": 2}),
    ("sub.Tensor", (rand(3, 4), rand(3, 4)), {"alpha": 0.3}),
    ("rsub.Scalar", (rand(3, 4), 1), {}),
    ("mul.Tensor", (rand(3, 4), rand(())), {}),
    ("div.Tensor", (rand(3, 4), positive(3, 1)), {}),
    ("div.Tensor_mode", (rand(3, 4) * 9, positive(3, 1)), {"rounding_mode": "floor"}),
    ("pow.Tensor_Scalar", (positive(3, 4), 2.5), {}),
    ("pow.Tensor_Scalar", (rand(3, 4), 2), {}),
    ("maximum.default", (rand(3, 4), rand(3, 4)), {}),
    ("minimum.default", (rand(3, 4), rand(3, 4)), {}),
    ("atan2.default", (rand(3, 4), rand(3, 4)), {}),
    *((f"{name}.Tensor", (ints(3, 4, 5), ints(3, 5)), {}) for name in COMPARISONS),
    *((f"{name}.Scalar", (ints(3, 4, 5), 1), {}) for name in COMPARISONS),
    ("logical_and.default", (mask(3, 4), mask(4)), {}),
    ("logical_or.default", (mask(3, 4), mask(4)), {}),
    ("logical_not.default", (mask(3, 4),), {}),
    ("where.self", (mask(3, 4), rand(3, 4), rand(())), {}),
    ("masked_fill.Scalar", (rand(3, 4), mask(3, 4), -1.5), {}),
    ("addcmul.default", (rand(3, 4), rand(3, 4), rand(3, 4)), {"value": 0.3}),
    ("addcdiv.default", (rand(3, 4), rand(3, 4), positive(3, 4)), {"value": -0.3}),
    ("addr.default", (rand(3, 4), rand(3), rand(4)), {"beta": 2, "alpha": 3}),
    ("lerp.Scalar", (rand(3, 4), rand(3, 4), 0.1), {}),
    ("lerp.Scalar", (rand(3, 4), rand(3, 4), 0.9), {}),
    ("threshold.default", (rand(3, 4), 0.1, 7.0), {}),
    ("clamp.default", (rand(3, 4), -0.5, 0.5), {}),
    ("clamp.default", (rand(3, 4), None, 0.5), {}),
    ("clamp_min.default", (rand(3, 4), 0.2), {}),
    ("clamp_max.default", (rand(3, 4), 0.2), {}),
    ("hardtanh.default", (rand(3, 4), -0.3, 0.4), {}),
    *(
        (f"{name}.default", (rand(3, 4),), {})
        for name in (
            *("abs", "neg", "reciprocal", "exp", "exp2", "expm1", "sin", "cos", "tan", "sinh", "cosh"),
            *("tanh", "atan", "erf", "floor", "ceil", "trunc", "sign", "sgn", "isnan", "isinf", "relu"),
            *("sigmoid", "silu", "log_sigmoid_forward", "softplus", "leaky_relu", "elu", "gelu"),
            *("hardsigmoid", "hardswish", "clone", "zeros_like", "ones_like"),
            *("erfc", "round", "frac"),
            *("celu", "mish", "hardshrink", "softshrink"),
        )
    ),
    *(
        (f"{name}.default", (rand(3, 4), rand(3, 4) * 4), {})
        for name in ("hardswish_backward", "hardsigmoid_backward", "mish_backward")
    ),
    *(
        (f"{name}.default", (torch.ones(4), torch.tensor([-3.0, -2.9, 2.9, 3.0])), {})
        for name in ("hardswish_backward", "hardsigmoid_backward")
    ),
    ("elu_backward.default", (rand(3, 4), 0.7, 1.5, 1.2, False, rand(3, 4)), {}),
    ("elu_backward.default", (rand(3, 4), 0.7, 1.5, 1.2, True, rand(3, 4).clamp(min=-0.9)), {}),
    ("celu.default", (rand(3, 4), 0.6), {}),
    ("log_sigmoid_backward.default",
     (rand(3, 4), SIGMOID, torch.ops.aten.log_sigmoid_forward(SIGMOID)[1]), {}),
    ("hardshrink_backward.default", (rand(3, 4), rand(3, 4), 0.5), {}),
    ("softshrink_backward.default", (rand(3, 4), rand(3, 4), 0.5), {}),
    ("_prelu_kernel.default", (rand(3, 4), rand(1, 4)), {}),
    ("_prelu_kernel_backward.default", (rand(3, 4), rand(1, 4), rand(3, 4)), {}),
    ("glu.default", (rand(3, 4, 2), 1), {}),
    ("glu_backward.default", (rand(3, 2, 2), rand(3, 4, 2), 1), {}),
    ("remainder.Scalar", (rand(3, 4) * 9, 1.5), {}),
    ("xlogy.Tensor", (torch.tensor([0.0, 2.0, 0.5]), positive(3)), {}),
    ("soft_margin_loss.default", (rand(3, 4), rand(3, 4).sign(), 1), {}),
    ("soft_margin_loss_backward.default", (rand(()), rand(3, 4), rand(3, 4).sign(), 1), {}),
    ("native_group_norm.default", (rand(3, 4, 5), rand(4), rand(4), 3, 4, 5, 2, 1e-5), {}),
    ("native_group_norm.default", (rand(3, 4), None, None, 3, 4, 1, 2, 1e-5), {}),
    ("native_group_norm_backward.default", normalized_group(rand(3, 4, 2, 3), 2, True), {}),
    ("native_group_norm_backward.default", normalized_group(rand(3, 4, 5), 1, False), {}),
    *(
        (f"upsample_{how}.default", (rand(2, 3, 5, 4), size, *more), {})
        for how, more in [("nearest2d", ()), ("bilinear2d", (False,)), ("bilinear2d", (True,)),
                          ("bicubic2d", (False,))]
        for size in ([8, 7], [10, 8], [3, 2])
    ),
    *(
        (f"upsample_{how}_backward.default", (rand(2, 3, *size), size, [2, 3, 5, 4], *more), {})
        for how, more in [("nearest2d", ()), ("bilinear2d", (False,)), ("bicubic2d", (True,))]
        for size in ([8, 7], [3, 2])
    ),
    ("upsample_nearest2d.default", (rand(1, 2, 3, 4), [6, 8], 2.0, 2.0), {}),
    ("_upsample_nearest_exact2d.default", (rand(1, 2, 5, 4), [3, 7]), {}),
    ("_upsample_bilinear2d_aa.default", (rand(1, 2, 8, 7), [3, 4], False), {}),
    ("upsample_nearest1d_backward.default", (rand(2, 3, 8), [8], [2, 3, 5]), {}),
    ("upsample_trilinear3d.default", (rand(1, 2, 3, 2, 4), [4, 5, 6], False), {}),
    ("floor_divide.default", (rand(3, 4) * 9, positive(3, 4)), {}),
    ("fmod.Tensor", (rand(3, 4) * 9, positive(3, 4)), {}),
    ("logaddexp.default", (rand(3, 4), rand(3, 4)), {}),
    *(
        ("_grouped_mm.default", (*factors, torch.tensor([1, 3, 4], dtype=torch.int32)), {})
        for factors in (
            (rand(4, 8), rand(3, 8, 4)), (rand(3, 4, 8), rand(8, 4)), (rand(8, 4), rand(4, 8)),
        )
    ),
    ("_grouped_mm.default", (rand(3, 4, 8), rand(3, 8, 4)), {}),
    ("_trilinear.default",
     (rand(3, 4), rand(2, 4, 5), rand(3, 5), [1, 3], [0], [1, 2], [2, 3]), {}),
    ("_trilinear.default", (rand(3, 2), rand(3, 4), rand(3, 5), [2, 3], [1, 3], [1, 2], [0]), {}),
    ("max_pool2d_with_indices.default",
     (rand(1, 2, 6, 5), [3, 2], [2, 3], [1, 1], [1, 1], True), {}),
    ("fractional_max_pool2d.default", (rand(2, 3, 9, 7), [3, 2], [4, 3], torch.rand(2, 3, 2)), {}),
    ("fractional_max_pool2d.default", (rand(3, 9, 7), [2, 2], [1, 4], torch.rand(1, 3, 2)), {}),
    ("fractional_max_pool3d.default",
     (rand(1, 2, 6, 7, 8), [2, 3, 2], [3, 2, 4], torch.rand(1, 2, 3)), {}),
    ("fractional_max_pool2d_backward.default", pooled_by_chance(rand(2, 3, 9, 7), [3, 2], [4, 3]), {}),
    ("fractional_max_pool3d_backward.default",
     pooled_by_chance(rand(1, 2, 6, 7, 8), [2, 3, 2], [3, 2, 4]), {}),
    *(
        ("multi_margin_loss.default", (rand(5, 4), ints(4, 5), p, 0.7, weight, reduction), {})
        for p, weight, reduction in [(1, None, 1), (2, positive(4), 0), (1, positive(4), 2)]
    ),
    ("multi_margin_loss.default", (rand(4), ints(4, 1)), {}),
    *(
        ("multi_margin_loss_backward.default",
         (rand(*size), rand(5, 4), ints(4, 5), p, 0.7, weight, reduction), {})
        for size, p, weight, reduction in
        [([()], 1, None, 1), ([5], 2, positive(4), 0), ([()], 1, positive(4), 2)]
    ),
    *(
        ("multilabel_margin_loss_forward.default", (rand(3, 4), LABELS, reduction), {})
        for reduction in (0, 1, 2)
    ),
    *(
        ("multilabel_margin_loss_backward.default", labelled(rand(3, 4), LABELS, reduction), {})
        for reduction in (0, 1, 2)
    ),
    *(("mkldnn_rnn_layer.default", recurrent(each), {}) for each in (False, True)),
    *(("mkldnn_rnn_layer_backward.default", recurrent_backward(each), {}) for each in (False, True)),
    ("adaptive_max_pool2d.default", (rand(2, 3, 7, 5), [3, 2]), {}),
    ("adaptive_max_pool3d.default", (rand(2, 3, 4, 5, 3), [3, 2, 1]), {}),
    ("adaptive_max_pool2d_backward.default", pooled_adaptively(rand(2, 3, 7, 5), 3, 2), {}),
    ("adaptive_max_pool3d_backward.default", pooled_adaptively(rand(2, 4, 5, 3), 3, 2, 1), {}),
    ("reflection_pad1d_backward.default", (rand(2, 3, 8), rand(2, 3, 4), [1, 3]), {}),
    ("reflection_pad2d_backward.default", (rand(2, 3, 6, 6), rand(2, 3, 4, 3), [1, 2, 0, 2]), {}),
    ("replication_pad2d_backward.default", (rand(2, 3, 6, 6), rand(2, 3, 4, 3), [1, 2, 0, 2]), {}),
    ("replication_pad3d_backward.default",
     (rand(1, 2, 4, 4, 4), rand(1, 2, 2, 3, 2), [1, 1, 1, 0, 2, 0]), {}),
    *(
        (f"{name}.default", (positive(3, 4) * 0.9,), {})
        for name in ("log", "log1p", "log2", "log10", "sqrt", "rsqrt", "asin", "acos")
    ),
    ("_to_copy.default", (rand(3, 4),), {"dtype": torch.float64}),
    ("copy_.default", (rand(3, 4), rand(4)), {}),
    ("zero_.default", (rand(3, 4),), {}),
    ("fill_.Scalar", (rand(3, 4), 2.5), {}),
    ("full_like.default", (rand(3, 4), 2.5), {}),
    ("threshold_backward.default", (rand(3, 4), rand(3, 4), 0), {}),
    ("threshold_backward.default", (rand(3), torch.tensor([math.nan, 1.0, -1.0]), 0), {}),
    ("tanh_backward.default", (rand(3, 4), torch.tanh(rand(3, 4))), {}),
    ("sigmoid_backward.default", (rand(3, 4), torch.rand(3, 4)), {}),
    ("silu_backward.default", (rand(3, 4), rand(3, 4)), {}),
    ("gelu_backward.default", (rand(3, 4), rand(3, 4)), {}),
    ("leaky_relu_backward.default", (rand(3, 4), rand(3, 4), 0.01, False), {}),
    ("hardtanh_backward.default", (rand(3, 4), rand(3, 4), -0.5, 0.5), {}),
    ("softplus_backward.default", (rand(3, 4), rand(3, 4), 2.0, 20.0), {}),
    ("native_dropout_backward.default", (rand(3, 4), mask(3, 4), 1.25), {}),
    ("_foreach_add.List", ([rand(3), rand(2, 2)], [rand(3), rand(2, 2)]), {"alpha": 2}),
    ("_foreach_mul_.ScalarList", ([rand(3), rand(2, 2)], [0.25, 0.5]), {}),
    ("_foreach_div_.List", ([rand(3), rand(2, 2)], [positive(3), positive(2, 2)]), {}),
    ("_foreach_addcdiv_.ScalarList", ([rand(3)], [rand(3)], [positive(3)], [0.1]), {}),
    ("_foreach_norm.Scalar", ([rand(3), rand(2, 2)],), {}),
    ("mm.default", (rand(3, 4), rand(4, 5)), {}),
    ("mm.default", (rand(4, 3).T, rand(5, 4).T), {}),
    ("bmm.default", (rand(2, 3, 4), rand(2, 4, 5)), {}),
    ("mv.default", (rand(3, 4), rand(4)), {}),
    ("dot.default", (rand(4), rand(4)), {}),
    ("addmm.default", (rand(5), rand(3, 4), rand(4, 5)), {}),
    ("addmm_.default", (rand(3, 5), rand(3, 4), rand(4, 5)), {"beta": 0.5, "alpha": -0.1}),
    ("addmv.default", (rand(3), rand(3, 4), rand(4)), {"alpha": -0.1}),
    ("baddbmm.default", (rand(2, 3, 5), rand(2, 3, 4), rand(2, 4, 5)), {"beta": 0, "alpha": 2}),
    ("addmv.default", (ints(9, 3), ints(9, 3, 4), ints(9, 4)), {"alpha": 1.6, "beta": 0.5}),
    ("addbmm.default", (rand(3, 5), rand(2, 3, 4), rand(2, 4, 5)), {}),
    ("sum.default", (rand(3, 4),), {}),
    ("sum.dim_IntList", (rand(3, 4, 2), [0, -1]), {}),
    ("mean.default", (rand(3, 4),), {}),
    ("mean.dim", (rand(3, 4, 2), [1], True), {}),
    ("cumsum.default", (rand(3, 4), 1), {}),
    ("prod.default", (rand(3, 2),), {}),
    ("prod.dim_int", (rand(3, 2), 1), {}),
    ("amax.default", (rand(3, 4), [1]), {}),
    ("amin.default", (rand(3, 4), [0], True), {}),
    ("max.default", (rand(3, 4),), {}),
    ("max.dim", (rand(3, 4), 1), {}),
    ("min.dim", (rand(3, 4), 0, True), {}),
    ("argmax.default", (rand(3, 4), 1), {}),
    ("any.dim", (mask(3, 4), 1), {}),
    ("logsumexp.default", (rand(3, 4), [1]), {}),
    ("linalg_vector_norm.default", (rand(3, 4),), {}),
    ("linalg_vector_norm.default", (rand(3, 4), math.inf, [0], True), {}),
    ("var.correction", (rand(3, 4), [1]), {"correction": 1}),
    ("var_mean.correction", (rand(3, 4), [1]), {"correction": 0, "keepdim": True}),
    ("std.correction", (rand(3, 4), [0]), {"correction": 1}),
    *(("convolution.default", case, {}) for case in CONVOLUTIONS),
    *(("convolution_backward.default", backward_of(case), {}) for case in CONVOLUTIONS),
    ("max_pool2d_with_indices.default", (rand(2, 3, 6, 5), [3, 2], [2, 1], [1, 1], [1, 2]), {}),
    ("max_pool2d_with_indices_backward.default",
     pooled(rand(2, 3, 6, 5), [3, 2], [2, 1], [1, 1], [1, 2], False), {}),
    ("avg_pool2d.default", (rand(2, 3, 6, 5), [3, 2], [2, 1], [1, 1], False, False), {}),
    ("avg_pool2d.default", (rand(2, 3, 6, 5), [3, 2], [2, 1], [1, 1]), {}),
    ("avg_pool2d_backward.default",
     (rand(2, 3, 3, 6), rand(2, 3, 6, 5), [3, 2], [2, 1], [1, 1], False, False, None), {}),
    ("avg_pool2d_backward.default",
     (rand(2, 3, 3, 3), rand(2, 3, 6, 6), [2, 2], [2, 2], [0, 0], False, True, None), {}),
    ("_adaptive_avg_pool2d.default", (rand(2, 3, 7, 5), [3, 2]), {}),
    ("_adaptive_avg_pool2d_backward.default", (rand(2, 3, 3, 2), rand(2, 3, 7, 5)), {}),
    ("native_batch_norm.default",
     (rand(5, 3, 2), rand(3), rand(3), rand(3), positive(3), True, 0.1, 1e-5), {}),
    ("native_batch_norm.default",
     (rand(5, 3), rand(3), None, rand(3), positive(3), False, 0.1, 1e-5), {}),
    ("native_batch_norm_backward.default", normalized_batch(rand(5, 3, 2), True), {}),
    ("native_batch_norm_backward.default", normalized_batch(rand(5, 3), False), {}),
    ("native_layer_norm.default", (rand(5, 3, 2), [3, 2], rand(3, 2), rand(3, 2), 1e-5), {}),
    ("native_layer_norm.default", (rand(5, 3), [3], None, None, 1e-5), {}),
    ("native_layer_norm_backward.default", normalized_layer(rand(5, 2, 3), [3]), {}),
    ("native_layer_norm_backward.default", normalized_layer(rand(5, 2, 3), [2, 3]), {}),
    ("_softmax.default", (rand(3, 4, 2), 1, False), {}),
    ("_log_softmax.default", (rand(3, 4), -1, False), {}),
    ("_softmax_backward_data.default", (rand(3, 4, 2), SOFT, 1, torch.float32), {}),
    ("_log_softmax_backward_data.default", (rand(5, 4), ROWS, 1, torch.float32), {}),
    *(("mse_loss.default", (rand(3, 4), rand(3, 4), each), {}) for each in (0, 1, 2)),
    *(("mse_loss_backward.default", (rand(()), rand(3, 4), rand(3, 4), each), {}) for each in (1, 2)),
    ("smooth_l1_loss.default", (rand(3, 4), rand(3, 4), 1, 0.5), {}),
    ("smooth_l1_loss_backward.default", (rand(()), rand(3, 4), rand(3, 4), 1, 0.5), {}),
    ("huber_loss.default", (rand(3, 4), rand(3, 4), 2, 0.5), {}),
    ("huber_loss_backward.default", (rand(()), rand(3, 4), rand(3, 4), 1, 0.5), {}),
    ("binary_cross_entropy.default", (positive(3, 4) / 1.2, torch.rand(3, 4), None, 1), {}),
    ("binary_cross_entropy_backward.default",
     (rand(()), positive(3, 4) / 1.2, torch.rand(3, 4), rand(3, 4), 1), {}),
    ("binary_cross_entropy_with_logits.default",
     (rand(3, 4), torch.rand(3, 4), rand(4), rand(4), 1), {}),
    ("nll_loss_forward.default", (ROWS, ints(4, 5), None, 1, -100), {}),
    ("nll_loss_forward.default", (ROWS, ints(4, 5), positive(4), 1, 2), {}),
    ("nll_loss_forward.default", (ROWS, ints(4, 5), positive(4), 2, 1), {}),
    ("nll_loss_forward.default", (ROWS, ints(4, 5), None, 0, 1), {}),
    ("nll_loss_forward.default", (ROWS[0], torch.tensor(2), positive(4), 0, -100), {}),
    ("nll_loss2d_forward.default", (IMAGES, ints(4, 2, 3, 2), positive(4), 1, 2), {}),
    ("nll_loss_backward.default", likelihood(ROWS, ints(4, 5), positive(4), 1, 2), {}),
    ("nll_loss_backward.default", likelihood(ROWS, ints(4, 5), None, 0), {}),
    ("nll_loss2d_backward.default", likelihood(IMAGES, ints(4, 2, 3, 2), None, 1), {}),
    ("embedding.default", (rand(6, 3), ints(6, 2, 4)), {}),
    ("embedding_dense_backward.default", (rand(2, 4, 3), ints(6, 2, 4), 6, 1, False), {}),
    ("index.Tensor", (rand(4, 5, 3), [None, ints(5, 2), ints(3, 2)]), {}),
    ("index_select.default", (rand(4, 5), 1, ints(5, 3)), {}),
    ("gather.default", (rand(4, 5), 1, ints(5, 4, 2)), {}),
    ("cat.default", ([rand(2, 3), rand(4, 3)], 0), {}),
    ("stack.default", ([rand(2, 3), rand(2, 3)], 1), {}),
    ("flip.default", (rand(2, 3), [1]), {}),
    ("roll.default", (rand(2, 3), [1], [1]), {}),
    ("repeat.default", (rand(2, 3), [2, 2]), {}),
    ("tril.default", (rand(3, 3), -1), {}),
    ("triu.default", (rand(3, 3), 1), {}),
    ("constant_pad_nd.default", (rand(2, 3), [1, 1], 0.5), {}),
    ("select_backward.default", (rand(2, 3), [2, 4, 3], 1, 2), {}),
    ("slice_backward.default", (rand(2, 2), [2, 4], 1, 1, 3, 1), {}),
    ("index_fill_.int_Scalar", (rand(4, 3), 1, torch.tensor([2]), 0.3), {}),
    ("index_put.default", (rand(4, 3), [ints(4, 6)], rand(6, 3), True), {}),
    ("index_add.default", (rand(4, 3), 0, ints(4, 6), rand(6, 3)), {"alpha": 2}),
    ("scatter_add.default", (rand(4, 3), 0, ints(4, 5, 2), rand(6, 3)), {}),
    ("scatter.src", (rand(4, 3), 1, torch.tensor([[0, 2], [1, 0]]), rand(2, 2)), {}),
    ("sort.default", (rand(4, 3), 1), {}),
    ("topk.default", (rand(4, 6), 2, 1), {}),
    ("pixel_shuffle.default", (rand(1, 4, 2, 2), 2), {}),
    ("_scaled_dot_product_flash_attention_for_cpu.default",
     (rand(2, 2, 5, 8), rand(2, 2, 5, 8), rand(2, 2, 5, 8), 0.0, True), {}),
    ("_scaled_dot_product_flash_attention_for_cpu.default",
     (rand(2, 2, 5, 8), rand(2, 2, 6, 8), rand(2, 2, 6, 8), 0.0, False),
     {"attn_mask": rand(5, 6), "scale": 0.4}),
    *(
        ("_scaled_dot_product_flash_attention_for_cpu.default",
         (rand(2, 4, 5, 3), rand(2, kv, 6, 3), rand(2, kv, 6, 3), 0.0, False), {})
        for kv in (1, 2)
    ),
    *(
        ("_scaled_dot_product_flash_attention_for_cpu_backward.default",
         attended(rand(2, 4, 5, 3), rand(2, kv, 5, 3), rand(2, kv, 5, 3), is_causal), {})
        for kv in (1, 2, 4) for is_causal in (False, True)
    ),
    ("_scaled_dot_product_flash_attention_for_cpu_backward.default",
     attended(rand(1, 2, 1, 3), rand(1, 2, 9, 3), rand(1, 2, 9, 3), True), {}),
    ("index_put.default", (rand(4), [ints(4, 6)], rand(()), True), {}),
    ("_amp_foreach_non_finite_check_and_unscale_.default",
     ([rand(3), rand(2, 2)], torch.zeros(1), torch.tensor(0.25)), {}),
    ("_fused_sgd_.default",
     ([rand(3)], [rand(3)], []),
     {"weight_decay": 0.1, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False,
      "maximize": False, "is_first_step": False}),
    *(
        (f"{name}.default",
         ([rand(3)], [rand(3)], [rand(3)], [positive(3)], [], [torch.tensor(3.0)]),
         {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False,
          "maximize": False})
        for name in ("_fused_adam_", "_fused_adamw_")
    ),
    ("_adaptive_avg_pool3d.default", (rand(1, 2, 5, 3, 4), [2, 3, 2]), {}),
    ("_adaptive_avg_pool3d_backward.default", (rand(1, 2, 2, 3, 2), rand(1, 2, 5, 3, 4)), {}),
    ("avg_pool3d.default", (rand(1, 2, 4, 5, 3), [2, 2, 2], [2, 1, 1], [1, 0, 1], False, False), {}),
    ("avg_pool3d_backward.default",
     (rand(1, 2, 2, 2, 2), rand(1, 2, 4, 4, 4), [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, None), {}),
    ("max_pool3d_with_indices.default", (rand(1, 2, 4, 5, 4), [2, 3, 2], [2, 1, 2]), {}),
    ("max_pool3d_with_indices_backward.default", pooled_in_space(rand(1, 2, 4, 5, 4), [2, 3, 2]), {}),
    ("all.dim", (mask(3, 4), 1), {}),
    ("argmin.default", (rand(3, 4), 0), {}),
    ("argmax.default", (rand(3, 4),), {}),
    ("count_nonzero.dim_IntList", (ints(3, 4, 5), [1]), {}),
    ("nansum.default", (torch.tensor([1.0, math.nan, 2.0]),), {}),
    ("std_mean.correction", (rand(3, 4), [1]), {"correction": 1}),
    ("linalg_vector_norm.default", (rand(3, 4), 3, [1]), {}),
    ("vdot.default", (rand(4), rand(4)), {}),
    ("bitwise_and.Tensor", (ints(8, 3, 4), ints(8, 4)), {}),
    ("bitwise_or.Scalar", (ints(8, 3, 4), 5), {}),
    ("logical_xor.default", (mask(3, 4), mask(4)), {}),
    ("round.decimals", (rand(3, 4) * 9,), {"decimals": 1}),
    ("clamp.Tensor", (rand(3, 4), rand(4) - 0.5, None), {}),
    ("div.Tensor_mode", (rand(3, 4) * 9, positive(3, 1)), {"rounding_mode": "trunc"}),
    ("gelu.default", (rand(3, 4),), {"approximate": "tanh"}),
    ("gelu_backward.default", (rand(3, 4), rand(3, 4)), {"approximate": "tanh"}),
    ("softplus_backward.default", (rand(3, 4), rand(3, 4) * 9, 1.0, 5.0), {}),
    ("_safe_softmax.default", (torch.tensor([[1.0, 2.0, -math.inf], [-math.inf] * 3]), 1), {}),
    ("_native_batch_norm_legit.default",
     (rand(5, 3), rand(3), rand(3), rand(3), positive(3), True, 0.1, 1e-5), {}),
    ("_native_batch_norm_legit_no_training.default",
     (rand(5, 3), rand(3), rand(3), rand(3), positive(3), 0.1, 1e-5), {}),
    ("binary_cross_entropy_with_logits.default", (rand(3, 4) * 50, torch.rand(3, 4), None, None, 2), {}),
    ("multi_margin_loss_backward.default",
     (rand(5), rand(5, 4), ints(4, 5), 1, 1.0, None, 0), {}),
    ("soft_margin_loss.default", (rand(3, 4), rand(3, 4).sign(), 0), {}),
    *(
        ("nll_loss_forward.default", (ROWS, ints(4, 5).byte(), positive(4), each, -100), {})
        for each in (0, 1)
    ),
    ("index_copy.default", (rand(4, 3), 0, torch.tensor([2, 0]), rand(2, 3)), {}),
    ("block_diag.default", ([rand(2, 3), rand(1, 2)],), {}),
    ("masked_select.default", (rand(3, 4), torch.ones(3, 4, dtype=torch.bool)), {}),
    ("take.default", (rand(3, 4), ints(12, 5)), {}),
    ("rot90.default", (rand(2, 3),), {}),
    ("diag_embed.default", (rand(2, 3),), {}),
    ("im2col.default", (rand(1, 2, 4, 4), [2, 2], [1, 1], [1, 0], [1, 1]), {}),
    ("pixel_unshuffle.default", (rand(1, 1, 4, 4), 2), {}),
    ("channel_shuffle.default", (rand(1, 4, 2, 2), 2), {}),
    ("native_channel_shuffle.default", (rand(1, 4, 2, 2), 2), {}),
    ("diagonal_backward.default", (rand(3), [3, 4], 0, 0, 1), {}),
    ("diagonal_scatter.default", (rand(3, 3), rand(3)), {}),
    ("select_scatter.default", (rand(3, 4), rand(4), 0, 1), {}),
    *(
        (f"{how}_pad{dims}d.default", (rand(2, 3, *[4] * dims), [1, 2] * dims), {})
        for how in ("reflection", "replication") for dims in (1, 2, 3)
    ),
    ("replication_pad1d_backward.default", (rand(2, 3, 7), rand(2, 3, 4), [1, 2]), {}),
    ("reflection_pad3d_backward.default",
     (rand(2, 3, 7, 7, 7), rand(2, 3, 4, 4, 4), [1, 2] * 3), {}),
    *(
        (f"{how}.default", (rand(1, 2, *[4] * dims), [5] * dims, *more), {})
        for how, dims, more in (
            ("upsample_linear1d", 1, (False,)),
            ("upsample_nearest1d", 1, ()),
            ("_upsample_nearest_exact1d", 1, ()),
            ("upsample_nearest3d", 3, ()),
            ("_upsample_nearest_exact3d", 3, ()),
            ("_upsample_bicubic2d_aa", 2, (False,)),
        )
    ),
    *(
        (f"{how}_backward.default",
         (rand(1, 2, *[5] * dims), [5] * dims, [1, 2, *[4] * dims], *more), {})
        for how, dims, more in (
            ("upsample_linear1d", 1, (True,)),
            ("_upsample_nearest_exact1d", 1, ()),
            ("_upsample_nearest_exact2d", 2, ()),
            ("upsample_nearest3d", 3, ()),
            ("_upsample_nearest_exact3d", 3, ()),
            ("upsample_trilinear3d", 3, (False,)),
            ("_upsample_bilinear2d_aa", 2, (False,)),
            ("_upsample_bicubic2d_aa", 2, (False,)),
        )
    ),
    ("arange.start_step", (2, 12, 3), {}),
    ("linspace.default", (0.5, 2.0, 4), {}),
    ("eye.m", (2, 3), {}),
    ("zeros.default", ([2, 3],), {}),
    ("ones.default", ([2, 3],), {}),
    ("full.default", ([2, 3], 2.5), {}),
    ("scalar_tensor.default", (2.5,), {}),
    ("new_zeros.default", (rand(2), [2]), {}),
    ("new_ones.default", (rand(2), [2]), {}),
    ("new_full.default", (rand(2), [2], 0.5), {}),
    *(
        ("_fused_sgd_.default",
         ([rand(3)], [rand(3)], [rand(3)]),
         {"weight_decay": decay, "momentum": 0.9, "lr": 0.1, "dampening": dampening,
          "nesterov": nesterov, "maximize": maximize, "is_first_step": is_first})
        for decay, dampening, nesterov, maximize, is_first in (
            (0.1, 0.3, False, True, False), (0.0, 0.0, True, False, False), (0.1, 0.0, True, True, True),
        )
    ),
    *(
        (f"{name}.default",
         ([rand(3)], [rand(3)], [rand(3)], [positive(3)], [positive(3)] if amsgrad else [],
          [torch.tensor(3.0)]),
         {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-2, "amsgrad": amsgrad,
          "maximize": True, "grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(found_inf)})
        for name in ("_fused_adam_", "_fused_adamw_")
        for amsgrad in (False, True) for found_inf in (0.0, 1.0)
    ),
    *(
        ("_fused_adagrad_.default",
         ([rand(3)], [rand(3)], [positive(3)], [torch.tensor(3.0)]),
         {"lr": 0.1, "lr_decay": decay, "weight_decay": decay, "eps": 1e-2, "maximize": bool(decay)})
        for decay in (0.0, 0.2)
    ),
]  # fmt: skip
