"""Kernels are let loose only on what fits them; and what is captured is sound."""

import copy
import json
from functools import partial

import pytest
import torch
from tests.descent import trained
from tests.step.torch_modules import WARNINGS
from torch import nn
from torch.nn import functional

import everystep
from everystep.errors import ProgramError
from everystep.program.step_program import Program

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.function = function

    def forward(self, x):
        return self.function(x * self.weight)


FUNCTIONS = {
    "attention": lambda z: functional.scaled_dot_product_attention(
        z[None, None], z[None, None], z[None, None]
    ),
    "bags": lambda z: functional.embedding_bag(torch.tensor([[1, 2], [0, 1]]), z),
    "determinant": lambda z: torch.slogdet(z.T @ z + torch.eye(4))[1],
    "distances": lambda z: torch.cdist(z, z * 2),
    "drawn": lambda z: z * torch.rand_like(z) + torch.randint(0, 3, (4,)) + torch.empty(4).normal_(),
    "eigenvalues": lambda z: torch.linalg.eigvalsh(z.T @ z),
    "expanded": lambda z: z.sum().expand(5, 4) + torch.zeros(1, 4),
    "factories": lambda z: z + torch.arange(4) + torch.eye(4)[0] + torch.full((4,), 2.0).long(),
    "fourier": lambda z: torch.fft.irfft(torch.fft.rfft(z)),
    "gathered": lambda z: z.gather(0, torch.tensor([[1, 0, 2, 1]])) + z[torch.tensor([2, 0])],
    "infinite": lambda z: (
        torch.maximum(z, torch.ones(4) * -torch.inf) + (z * 0).add(torch.inf).clamp(max=1)
    ),
    "looked up": lambda z: functional.embedding(torch.tensor([1, 2]), z),
    "padded": lambda z: functional.pad(z[None], (2, 1), mode="reflect"),
    "picked": lambda z: functional.max_pool1d(z[None], 2),
    "scattered": lambda z: torch.zeros(3, 4).scatter_add(0, torch.zeros(6, 4, dtype=torch.long), z),
    "singular values": lambda z: torch.linalg.svdvals(z),
    "sorted": lambda z: z.sort(0)[0] + z.topk(2, 0)[0][:1] + z.median(0)[0] + z.cummax(0)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_program_of_a_function_is_read_as_it_was_written(name, make_trainee, program_of):
    model, x = Function(FUNCTIONS[name]), torch.randn(6, 4)
    training = make_trainee(model, x, torch.zeros(6), loss=lambda p, y: p.abs().square().mean())
    text = program_of(training).to_json()
    assert Program.from_json(text).to_json() == text


class FusedAdam(torch.optim.Adam):
    """Not torch's own class: a program has its kernel, not its step."""


@pytest.fixture
def convolutional(make_trainee, program_of):
    """A program as JSON data; its backward pass uses what the forward pass kept."""
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(18, 3))
    optimizer = partial(FusedAdam, fused=True)
    training = make_trainee(model, torch.randn(4, 1, 8, 8), torch.randn(4, 3), optimizer=optimizer)
    return json.loads(program_of(training).to_json())


def place_of(program, name):
    """Return where the operation of this name is, and the operation."""
    operations = program["operations"]
    index = next(i for i, each in enumerate(operations) if each["operator"].split(".")[1] == name)
    return index, operations[index]


def refused(program, message):
    with pytest.raises(ProgramError, match=message):
        Program.from_json(json.dumps(program))


def test_a_network_that_is_sound_is_read(convolutional):
    Program.from_json(json.dumps(convolutional))


def test_the_backward_pass_of_nothing_is_refused(convolutional):
    index, _ = place_of(convolutional, "max_pool2d_with_indices")
    del convolutional["operations"][index]
    refused(convolutional, "max_pool2d_with_indices_backward.*has no matching max_pool2d_with_indices")


def test_places_that_the_forward_pass_did_not_find_are_refused(convolutional):
    _, forward = place_of(convolutional, "max_pool2d_with_indices")
    _, backward = place_of(convolutional, "max_pool2d_with_indices_backward")
    own = forward["results"][1]
    convolutional["tensors"]["other"] = copy.deepcopy(convolutional["tensors"][own])
    convolutional["storages"]["other"] = copy.deepcopy(convolutional["storages"][own])
    backward["arguments"] = ["other" if a == own else a for a in backward["arguments"]]
    refused(convolutional, "has no matching max_pool2d_with_indices before it")


@pytest.mark.parametrize("where", ["after", "on the same storage"])
def test_places_that_were_changed_are_refused(convolutional, where):
    index, forward = place_of(convolutional, "max_pool2d_with_indices")
    result, places = forward["results"]
    if where == "after":
        number = {"phase": "forward", "operator": "aten.fill_.Scalar", "results": [places]}
        convolutional["operations"].insert(index + 1, number | {"arguments": [places, 10**12]})
        convolutional["activations"] = {}  # later ones are there one operation later
    else:
        convolutional["tensors"][result]["storage"] = places
    refused(convolutional, "has no matching max_pool2d_with_indices before it")


@pytest.mark.parametrize("count", [0, 10**6, -1, None])
def test_outputs_that_are_not_there_yet_are_refused(convolutional, count):
    convolutional["done"] |= {"0": count}
    if count is None:
        del convolutional["done"]["0"]
    refused(convolutional, "the output of '0' is not there")


@pytest.mark.parametrize(
    ("operator", "place", "value"),
    [
        ("convolution_backward", 8, [2**40, 0]),
        ("max_pool2d_with_indices_backward", 2, [3, 3]),
        ("native_batch_norm_backward", 2, "parameter/0.weight"),
        ("native_batch_norm", 1, "loss"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(convolutional, operator, place, value):
    _, operation = place_of(convolutional, operator)
    operation["arguments"][place] = value
    refused(convolutional, operator)


def test_tensors_of_a_fused_update_must_fit_each_other(convolutional):
    _, update = place_of(convolutional, "_fused_adam_")
    averages = update["arguments"][2]
    shorter = copy.deepcopy(convolutional)
    place_of(shorter, "_fused_adam_")[1]["arguments"][2].pop()
    refused(shorter, "_fused_adam_.*do not fit together")
    averages[0], averages[1] = averages[1], averages[0]
    refused(convolutional, "_fused_adam_.*do not fit together")


def one_operation(operator, arguments, shapes, results, **more):
    """Return a program of one operation on tensors of these shapes, and of a loss."""
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    storages = {name: {"kind": "temporary", "bytes": size} for name, size in sizes.items()}
    tensors = {name: {"dtype": "float32", "shape": shape} for name, shape in shapes.items()}
    operation = {"phase": "forward", "operator": f"aten.{operator}", "arguments": arguments}
    return {
        "format": "everystep program",
        "version": 1,
        "torch": torch.__version__,
        "storages": storages | {"loss": {"kind": "temporary", "bytes": 4}},
        "tensors": tensors | {"loss": {"dtype": "float32", "shape": []}},
        "operations": [operation | {"results": results} | more],
        "loss": "loss",
    }


def test_a_factorization_into_tensors_that_are_given_is_read():
    shapes = {"a": [2, 2], "factors": [2, 2], "swaps": [2], "info": []}
    given = {"LU": "factors", "pivots": "swaps", "info": "info"}
    results = ["factors", "swaps", "info"]
    program = one_operation("linalg_lu_factor_ex.out", ["a"], shapes, results, keywords=given)
    for name in ("swaps", "info"):
        program["tensors"][name]["dtype"] = "int32"
    Program.from_json(json.dumps(program))


@pytest.mark.parametrize("names", [["LU_data", "LU_pivots"], ["LU_pivots", "LU_data"]])
def test_pivots_that_no_factorization_made_are_refused_in_any_order(names):
    shapes = {"a": [2, 2, 2], "values": [2, 2], "vectors": [2, 2, 2], "pivots": [2, 2]}
    arguments = ["a", {"text": "L"}, True]
    program = one_operation("_linalg_eigh.default", arguments, shapes, ["values", "vectors"])
    program["tensors"]["pivots"]["dtype"] = "int32"
    program["tensors"] |= dict.fromkeys("plu", program["tensors"]["a"])
    program["storages"] |= dict.fromkeys("plu", program["storages"]["a"])
    given = {"LU_data": "vectors", "LU_pivots": "pivots"}
    unpack = {"phase": "forward", "operator": "aten.lu_unpack.default", "results": ["p", "l", "u"]}
    program["operations"].append(unpack | {"keywords": {name: given[name] for name in names}})
    refused(program, "lu_unpack.*has no matching factorization before it")


A_LOT = 2**45


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("mm.default", ["a", "a"], "a and b must have same reduction dim|must"),
        ("mul.Tensor", ["a", "b"], "broadcast"),
        ("neg.default", ["b"], r"returns float32 \[5\] as r, which should be float32 \[2, 3\]"),
        ("gt.Scalar", ["a", 0], r"returns bool \[2, 3\] as r, which should be float32"),
        ("zeros.default", [[A_LOT]], "more bytes than all storages"),
        ("ones.default", [[-1]], "nonnegative|negative"),
        ("arange.default", [A_LOT], "more bytes than all storages"),
        ("repeat.default", ["a", [A_LOT, 1]], "more bytes than all storages"),
        ("constant_pad_nd.default", ["a", [0, A_LOT]], "more bytes than all storages"),
        ("upsample_nearest1d.default", ["c", [A_LOT]], "more bytes than all storages"),
        ("repeat.default", [1.5, [A_LOT]], "has no tensor"),
        ("median.dim", ["a", 7], "median"),
        ("softplus.default", [None], "self must be of type Tensor"),
        ("view.default", ["a", [6]], "computes nothing"),
        ("empty.memory_format", [[2, 3]], "computes nothing"),
        ("clamp.default", ["a", "b"], "for argument 'min'"),
        ("clamp.default", ["a", {"float": "nine"}], "{'float': 'nine'} is not an argument"),
        ("sum.dim_IntList", ["a", [{"float": "nan"}]], "for argument 'dim'"),
        ("sum.dim_IntList", ["a", [2**63]], "for argument 'dim'"),
        ("cat.default", [["a", 1.0]], "tensors must be of type List"),
        ("gelu.default", ["a"], "r, which"),
        ("_fft_c2r.default", ["a", [-1], 0, 4], "do not fit"),
        ("nonzero.default", ["wide"], "more bytes than all storages"),
        ("masked_select.default", ["column", "row"], "do not fit"),
    ],
)
def test_an_operator_that_does_not_fit_is_refused_by_name(operator, arguments, message):
    shapes = {"a": [2, 3], "b": [5], "c": [1, 2, 3], "r": [2, 3]}
    program = one_operation(operator, arguments, shapes, ["r"])
    if operator == "gelu.default":
        program["tensors"]["r"]["shape"] = [3, 2]
    # Views that show one number many times.
    for name, shape in {"wide": [2**22, 2**22], "column": [2**22, 1], "row": [1, 2**22]}.items():
        view = {"storage": "a", "dtype": "float32", "shape": shape, "stride": [0, 0]}
        program["tensors"][name] = view
    with pytest.raises(ProgramError, match=message) as raised:
        Program.from_json(json.dumps(program))
    assert f"aten.{operator}" in str(raised.value)
    assert "operations.0" in str(raised.value)


def test_numbers_that_json_does_not_have_are_written_as_such():
    program = one_operation("clamp.default", ["a", -1.0, {"float": "inf"}], {"a": [2], "r": [2]}, ["r"])
    again = Program.from_json(json.dumps(program))
    assert Program.from_json(again.to_json()) == again
    refused = json.dumps(program).replace('{"float": "inf"}', "Infinity")
    with pytest.raises(ProgramError, match="Infinity is not a JSON number"):
        Program.from_json(refused)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 900 + "1" + "}" * 900,
        "9" * 5000,
        '{"version": 1e999}',
        '{"tensors": {"a": {"dtype": "float32", "shape": [' + "9223372036854775807," * 9999 + "1]}}}",
        b"\xff\xfe{",
        '"\\ud800"',
        '{"version": true}',
    ],
    ids=[
        "deep list",
        "deep object",
        "long number",
        "infinity",
        "many sizes",
        "bytes",
        "surrogate",
        "true",
    ],
)
def test_odd_texts_are_no_program(text):
    with pytest.raises(ProgramError):
        Program.from_json(text)


def test_reading_draws_no_random_numbers(make_trainee, program_of):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    text = program_of(make_trainee(model, torch.randn(6, 4), torch.randn(6, 4))).to_json()
    before = torch.get_rng_state()
    Program.from_json(text)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_says_nothing(recwarn):
    program = one_operation(
        "maximum.out", ["a", "a"], {"a": [2], "r": [3]}, ["r"], keywords={"out": "r"}
    )
    refused(program, r"returns float32 \[2\] as r, which should be float32 \[3\]")
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.RMSNorm(8)],
    ids=lambda layer: type(layer).__name__,
)
def test_statistics_of_every_dtype_are_read_on_a_machine_that_has_not_seen_the_program(
    layer, dtype, tmp_path, monkeypatch
):
    model = nn.Sequential(nn.Linear(4, 8), copy.deepcopy(layer), nn.Linear(8, 1)).to(dtype)
    x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, 1, dtype=dtype)
    run = trained(model, (x, y), steps=3, run=tmp_path / "run")
    monkeypatch.setattr("everystep.program.soundness._is_known_sound", lambda content: False)
    assert run.facts.training.engine.reason is None
    assert everystep.open(run.directory).verify(processes=1, progress=False).is_exact
