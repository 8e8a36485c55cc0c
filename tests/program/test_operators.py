"""The allow-list: every operator of this torch, looked at."""

import re

import pytest
import torch

from everystep.ops.operators import NotAllowedError, computes, parameters
from everystep.program.allowed import BY_VALUES, resolve
from everystep.program.collectives import COLLECTIVES

#: Properties in torch of an operator that does more than compute, or returns something else than
#: tensors.
UNWANTED = {torch.Tag.data_dependent_output, torch.Tag.inplace_view, torch.Tag.view_copy}
#: Types that are numbers, tensors, or say how to compute.
PLAIN = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|int|float|bool|str|ScalarType|Layout|MemoryFormat|Device"
    r"|Generator)\]*"
)


def all_names():
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        yield f"{namespace}.{base}.{overload or 'default'}"


def allowed_operators():
    for name in all_names():
        try:
            yield resolve(name)
        except NotAllowedError:
            continue


def test_what_is_allowed_makes_tensors_of_known_shapes_with_few_exceptions():
    names = set()
    for operator in allowed_operators():
        if str(operator) in BY_VALUES:
            continue
        assert operator.namespace == "aten" or str(operator) in COLLECTIVES
        assert not UNWANTED & set(operator.tags), operator
        for parameter in parameters(operator):
            assert PLAIN.fullmatch(parameter.kind), (operator, parameter)
            if "str" in parameter.kind:
                names.add(parameter.name)
        for result in operator._schema.returns:
            is_size = str(result.type) == "int" and "scaled_dot_product" in str(operator)
            assert is_size or str(result.type) in ("Tensor", "List[Tensor]"), operator
    # Texts that are the name of a way to compute, and of no file.
    assert names <= {"approximate", "rounding_mode", "reduce", "side", "mode", "driver", "UPLO"}


def test_what_a_program_has_gives_no_view_and_nothing_changes_shape_in_place():
    for operator in filter(computes, allowed_operators()):
        for result in operator._schema.returns:
            assert result.alias_info is None or result.alias_info.is_write, operator
        name = operator.overloadpacket.__name__
        assert not re.search(r"resize|^set_?$|strided|squeeze|^transpose|^_?pin|^detach|^empty", name)


#: Operators of aten that do something else than compute, or that TorchScript alone can call.
REFUSED = """
from_file.default item.default equal.default set_.source_Tensor set_.default resize_.default
resize_as_.default set_data.default as_strided_.default transpose_.default t_.default squeeze_.default
detach_.default swapaxes_.default rename_.default requires_grad_.default record_stream.default
_resize_output_.default _pin_memory.default pin_memory.default _copy_from.default _print.default
_assert_async.msg _assert_tensor_metadata.default warn.default _cudnn_rnn_flatten_weight.default
_cudnn_init_dropout_state.default _lazy_clone.default sym_constrain_range.default _make_dep_token.default
_foobar.default bincount.out repeat_interleave.Tensor_out _unsafe_index.Tensor _unsafe_index_put.default
segment_reduce.default _coalesced_.default special_chebyshev_polynomial_t.default to_sparse.default
quantize_per_tensor.default _linalg_check_errors.default _nested_from_padded.default
_test_warn_in_autograd.default copy_.int sort.int split.default
"""


@pytest.mark.parametrize("name", REFUSED.split())
def test_what_does_something_else_is_not_allowed(name):
    with pytest.raises(NotAllowedError, match=re.escape(name.split(".")[0])):
        resolve(f"aten.{name}")


@pytest.mark.parametrize(
    "name",
    [
        "prim.device.default", "prims.add.default",
        "profiler._record_function_enter_new.default", "aten", "aten.", "aten.mul", "aten.mul.",
        "aten.mul.Tensor.more", "aten.mul.Tensor\n", " aten.mul.Tensor", "aten.__class__.x",
        "aten.mul.__call__", "aten.mul._schema", "aten.name.default", "os.system.default",
        "torch.optim.Adam", "aten.mul.Tensör", "aten.addmm.none", "", "\x00",
        "aten.mul.Tensor\x00",
    ],
)  # fmt: skip
def test_names_that_are_none_are_refused(name):
    with pytest.raises(NotAllowedError):
        resolve(name)


def test_a_step_may_call_views_and_a_program_needs_none():
    for name in ("view.default", "as_strided.default", "expand.default", "_unsafe_view.default"):
        assert not computes(resolve(f"aten.{name}"))
    for name in ("mul.Tensor", "add_.Tensor", "zeros.default", "copy_.default", "_to_copy.default"):
        assert computes(resolve(f"aten.{name}"))
