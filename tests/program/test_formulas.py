"""Every formula that `why` shows, read as it is written and computed with the numbers next to it.

`benchmarks.why_by_hand` reads the text as Python and knows nothing of everystep's rules.
"""

import csv
import json
import math
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks.why_by_hand import ALL, complaints, evaluated
from tests.descent import descend, trained
from tests.program.operator_calls import CASES, positive, rand
from torch.nn import functional

import everystep
from everystep.ops import PERMITTED, RECORDS
from everystep.ops.arguments import decode
from everystep.ops.call import kind_of as kind_of_name
from everystep.ops.operator_record import OperatorRecord
from everystep.views.formatting import TIMES
from everystep.views.mathematics import kind_of, mathematics

#: Operators, or their results, for which there are only words, and why.
WORDS = {
    "bernoulli": "drawn",
    "exponential": "drawn",
    "multinomial": "drawn",
    "normal": "drawn",
    "poisson": "drawn",
    "native_dropout, result 2": "drawn",
    "rand": "drawn",
    "rand_like": "drawn",
    "randint": "drawn",
    "randn": "drawn",
    "randn_like": "drawn",
    "randperm": "drawn",
    "uniform": "drawn",
    "amp_foreach_non_finite_check_and_unscale": "whether any of all gradients is infinite",
    "mkldnn_rnn_layer": "a kernel that shows nothing of what it computes in between",
    "mkldnn_rnn_layer, result 2": "a kernel that shows nothing of what it computes in between",
    "mkldnn_rnn_layer, result 3": "a kernel that shows nothing of what it computes in between",
    "mkldnn_rnn_layer_backward": "a kernel that shows nothing of what it computes in between",
}
WORDS |= {f"mkldnn_rnn_layer_backward, result {n}": "as the kernel before" for n in range(2, 8)}
WORDS |= {
    f"{name}, result 2": "a place, which is found and not computed"
    for name in (
        *("adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d"),
        *("fractional_max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *("sort", "topk"),
    )
}
#: Kinds that no case has: a program never holds them, or they draw as those in WORDS do.
NOT_TRIED = {
    *("cauchy", "geometric", "log_normal", "normal_functional", "randint_like", "random"),
    *("max_pool2d", "avg_pool1d", "linear"),
    *("scaled_dot_product_flash_attention_backward", "scaled_dot_product_flash_attention"),
    *("scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention"),
    "scaled_dot_product_fused_attention_overrideable",
}
DRAWN = [
    ("bernoulli.default", (torch.rand(3),), {}),
    ("bernoulli.p", (rand(3), 0.4), {}),
    ("exponential_.default", (rand(3),), {}),
    ("multinomial.default", (positive(3), 2), {}),
    ("poisson.default", (positive(3),), {}),
    ("normal_.default", (rand(3),), {}),
    ("native_dropout.default", (rand(3, 4), 0.4, True), {}),
    ("native_dropout.default", (rand(3, 4), 1.0, True), {}),
    ("rand.default", ([3],), {}),
    ("rand_like.default", (rand(3),), {}),
    ("randint.default", (9, [3]), {}),
    ("randn.default", ([3],), {}),
    ("randn_like.default", (rand(3),), {}),
    ("randperm.default", (3,), {}),
    ("uniform_.default", (rand(3),), {}),
]
EVERY = [*CASES, *DRAWN]
#: So many operators are called in one step.
TOGETHER = 8
GROUPS = [EVERY[begin : begin + TOGETHER] for begin in range(0, len(EVERY), TOGETHER)]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def copied(value):
    """Return arguments that may be written into, with the strides of those given."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    return [copied(each) for each in value] if isinstance(value, list | tuple) else value


def called(name, given, keywords):
    """Call an operator of aten; return all that it makes or writes, as one number."""
    kind, overload = name.rsplit(".", 1)
    given = copied(given) if kind.endswith("_") else given
    made = getattr(getattr(torch.ops.aten, kind), overload)(*given, **keywords)
    used = [made, given] if kind.endswith("_") else made
    return sum(tensor.sum() for tensor in tensors_in(used) if tensor.numel())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which the steps call every operator."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("formulas") / "run"
    batches = [[(given, keywords) for _, given, keywords in group] for group in GROUPS]
    with everystep.record(run=path, state=torch.zeros(1)) as recording:
        for number, batch in enumerate(recording.steps(batches)):
            loss = torch.zeros(())
            for (name, *_), (given, keywords) in zip(GROUPS[number], batch, strict=True):
                loss = loss + called(name, given, keywords)
            recording.log(loss=loss)
    return everystep.open(path)


@pytest.fixture(scope="module")
def answers(run):
    """Answers of `why` for a number of every result of every operator, with what they are of."""
    found, chance = [], random.Random(0)
    for number, group in enumerate(GROUPS, 1):
        step = run[number]
        own = {f"aten.{name}" for name, *_ in group}
        for place, seen in enumerate(step.operations):
            if seen.operation.operator in own:
                found += [*asked(step, place, seen, chance)]
    return found


def asked(step, place, seen, chance):
    kind = re.sub(r"^_|(?<=[a-z0-9])_$", "", seen.operation.name)
    results = [*seen.operation.results]
    results += [name for name in seen.operation.written() if name not in results]
    for result, name in enumerate(results, 1):
        tensor = seen.results.get(name)
        if tensor is None or not tensor.numel() or (place, "results", name) in step.unset:
            continue
        what = f"{kind}, result {result}" if result > 1 else kind
        index = [chance.randrange(size) if chance.random() < 0.8 else 0 for size in tensor.shape]
        at = f"{index}" if index else ""
        yield what, step.why(f"#{place}{f'.{result}' if result > 1 else ''}{at}", terms=ALL)


def test_each_formula_gives_the_number_that_it_stands_next_to(answers):
    assert len(answers) > 500
    wrong = []
    for what, answer in answers:
        if answer.formula and answer.recomputed is None:
            wrong.append(f"{what}: {answer.formula} is not computed")
        wrong += [f"{what}: {each}" for each in complaints(answer)]
    assert wrong == []


def test_words_stand_only_where_there_can_be_no_formula(answers):
    in_words = {
        re.sub(r"(?<=unscale), result \d", "", what)
        for what, answer in answers
        if not answer.formula and not answer.unknown
    }
    assert in_words == {*WORDS}
    assert [what for what, answer in answers if answer.unknown] == []


def test_what_words_name_is_all_that_goes_in(answers):
    """With all other numbers changed, a kernel gives the same."""
    for what, answer in answers:
        if answer.formula or WORDS.get(what, "drawn") == "drawn" or "unscale" in what:
            continue
        operation = answer.step.operations[answer.operation]
        named = {(number.spot.name, number.spot.index) for number in answer.numbers}

        def other(name, seen=operation, named=named):
            tensor, known = seen.inputs[name].clone(), seen.inputs[name]
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 0.7)
            for index in (index for of, index in named if of == name):
                tensor[index] = known[index]
            return tensor

        arguments = decode(operation.operation.arguments, other)
        results = operation.operation.resolved(*arguments)
        result = int((re.findall(r"result (\d+)", what) or [1])[0]) - 1
        found = results[result][answer.number.spot.index].item()
        assert found == pytest.approx(answer.number.value, rel=2e-5, abs=2e-5), what


def test_what_is_drawn_by_probabilities_has_them_as_its_inputs(answers):
    drawn = {what: answer.numbers for what, answer in answers if what in ("multinomial", "poisson")}
    assert {what: len(numbers) for what, numbers in drawn.items()} == {"multinomial": 3, "poisson": 1}


def test_a_number_that_is_put_where_several_meet_is_not_known(tmp_path):
    with everystep.record(run=tmp_path / "run", state=torch.zeros(1)) as recording:
        for given, put in recording.steps([(rand(1, 3), rand(1, 2))]):
            recording.log(loss=given.scatter(1, torch.tensor([[1, 1]]), put).sum())
    assert recording.run.why(1, "#0[0, 1]").unknown == ("x", "input", "y")
    assert recording.run.why(1, "#0[0, 0]").formula == "self"


def test_each_rule_is_tried(answers):
    tried = {re.sub(r", result \d", "", what).removeprefix("foreach_") for what, _ in answers}
    assert {kind for kind, each in RECORDS.items() if each.made} - tried == NOT_TRIED


def test_an_operator_that_was_known_stays_known():
    text = Path(__file__).with_name("known_operators.tsv").read_text()
    table = [*csv.DictReader(text.splitlines(), delimiter="\t")]
    rules = {row["operator"]: RECORDS.get(row["operator"], OperatorRecord()) for row in table}
    now = {name: (bool(each.made), bool(each.rows)) for name, each in rules.items()}
    assert now == {row["operator"]: (bool(row["why now"]), bool(row["rows now"])) for row in table}
    # By name, as a stranger's program has it: with its overload, where that is the only one, and a mark,
    # where the kernel trusts its arguments.
    permitted = {kind: [] for kind in RECORDS}
    for name, record in sorted(PERMITTED.items()):
        trusts = any((record.fits, record.arguments, record.kept))
        permitted[kind_of_name(name)].append(name + ".default" * record.by_values + "!" * trusts)
        assert record[:3] == RECORDS[kind_of_name(name)][:3]
    listed = {row["operator"]: row["permitted"].split() for row in table if row["permitted"]}
    assert permitted == listed, "new operators belong into the table"
    lost = {
        row["operator"]
        for row in table
        for of in ("why", "rows")
        if row[f"{of} before"] > row[f"{of} now"]
    }
    # A program has no operation for memory that is only allocated, nor for a constant of Python's.
    assert lost == {"empty_like", "new_empty", "lift_fresh"}


#: Operations of which the line gives no result by itself, and why.
NOT_READ = {
    "batch_norm": "its settings and buffers are of the module",
    "group_norm": "its settings are of the module",
    "layer_norm": "its settings are of the module",
    "dropout": "drawn",
    "gelu_backward": "the slope of a function has a name only",
    **dict.fromkeys(("exponential", "normal", "uniform", "bernoulli", "multinomial"), "drawn"),
    "poisson": "drawn",
    **dict.fromkeys(("rand", "rand_like", "randint", "randn", "randn_like", "randperm"), "drawn"),
}


# The line of a backward operation that is written as a call leaves out the settings of the forward.
def test_each_operation_as_mathematics_gives_its_result(run):
    wrong, read = [], set()
    for number in range(1, len(run) + 1):
        step = run[number]
        for line, seen in zip(mathematics(step.operations), step.operations, strict=True):
            kind = kind_of(seen.operation)
            is_call = line.right.startswith(f"{kind}(")
            if kind in NOT_READ or ("backward" in kind and is_call) or not seen.results:
                continue
            try:
                found = first(read_as_torch(line, seen))
            except Exception as error:
                wrong.append(f"{seen.operation.operator}: {line.right}: {error!r}")
                continue
            name = next(name for name in (*seen.operation.results, *seen.results) if name)
            expected = seen.results[name]
            read.add(kind)
            if found.numel() == expected.numel():
                found = found.reshape(expected.shape)
            if not torch.allclose(
                found.double().expand(expected.shape), expected.double(), 1e-4, 1e-5, equal_nan=True
            ):
                wrong.append(f"{seen.operation.operator}: {line.right}")
    assert wrong == []
    assert len(read) > 200


def first(result):
    return first(result[0]) if isinstance(result, list | tuple) else torch.as_tensor(result)


#: How the signs of a line are written in Python.
_IN_PYTHON = [
    ("²", "**2"),
    (r"\^", "**"),
    ("·", "@"),
    (TIMES, ":"),
    (r", (stride|padding|dilation|output_padding|groups) ([\d:]+)", r", \1=[\2]"),
    (r"max_pool\((\w+), ([\d:]+)", r"max_pool(\1, [\2]"),
    ("ceil_mode True", "ceil_mode=True"),
    (":", ", "),
    (r"(conv\w*\(.*)\) \+ (\w+)$", r"\1, bias=\2)"),
    (r"(.+) if (.+) else (.+)$", r"chosen(\2, \1, \3)"),
    (r"(.+) at (\w+) else 0$", r"placed(\1, \2)"),
    (r"sum of (\w+) at (\w+)", r"added(\1, \2)"),
    (r"(\w+)\[(\w+)\]", r"picked(\1, \2)"),
    (r"=(floor|trunc|tanh|none)\b", r"='\1'"),
    (r"\b([a-z]\w*)\(", r"f_\1("),
]


def read_as_torch(line, seen):
    """Evaluate a line as torch would, with its names for tensors."""
    known, text = Functions(seen), line.right
    texts = sorted({*line.given.values()} - {"1"}, key=len, reverse=True)
    for place, called in enumerate(texts):
        given = next(name for name, each in line.given.items() if each == called)
        known[f"v{place}_"] = seen.inputs[given].clone()
        text = re.sub(rf"(?<![\w.#]){re.escape(called)}(?![a-z0-9_])", f"v{place}_", text)
    for sign, python in _IN_PYTHON:
        text = re.sub(sign, python, text)
    return eval(text, {"__builtins__": {}}, known)


#: What an argument without a default is where it is not written, by its type.
OFF = {"bool": False, "Optional": None, "List": []}


class Functions(dict):
    """Functions by name; those that are not here are the operators of aten."""

    def __init__(self, seen):
        shape = next((each.shape for each in seen.results.values()), ())
        picks = "nll" in seen.operation.name
        super().__init__(
            f_sum=lambda x, *dims: x.double().sum(dims or None, keepdim=bool(dims)),
            f_mean=lambda x, *dims: x.double().mean(dims or None, keepdim=bool(dims)),
            f_copy=torch.clone,
            f_exp=torch.exp,
            f_floor=torch.floor,
            f_trunc=torch.trunc,
            f_conv=functional_of("conv", seen),
            f_conv_transpose=functional_of("conv_transpose", seen),
            f_max_pool=functional.max_pool2d,
            f_attention=partial(functional.scaled_dot_product_attention, enable_gqa=True),
            f_chosen=torch.where,
            f_placed=lambda value, at: torch.zeros(shape).scatter(
                -1, at[:, None], value.float().expand(len(at), 1)
            ),
            f_added=lambda value, at: torch.zeros(shape).index_add(
                0, at.flatten(), value.flatten(0, -2)
            ),
            f_picked=lambda x, at: x.gather(-1, at[..., None])[..., 0] if picks else x[at],
            inf=math.inf,
        )
        self.operator = seen.operation.resolved

    def __missing__(self, name):
        if not name.startswith("f_"):
            raise KeyError(name)

        def called(*given, **settings):
            parameters = self.operator._schema.arguments
            known = dict(zip((each.name for each in parameters), given, strict=False)) | settings
            for each in parameters:  # what is off is not written
                if each.name not in known and not each.has_default_value():
                    known[each.name] = OFF[str(each.type).partition("[")[0]]
            made = self.operator(**known)
            return known[parameters[0].name] if made is None else made

        return called


def functional_of(name, seen):
    dims = next((each.dim() for each in seen.inputs.values()), 2) - 2

    def called(x, weight, groups=(1,), **settings):
        function = getattr(functional, f"{name}{dims}d")
        sizes = {
            key: of if isinstance(of, torch.Tensor) else (of * dims)[:dims]
            for key, of in settings.items()
        }
        return function(x, weight, groups=groups[0], **sizes)

    return called


OPTIMIZERS = [
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "fused": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("AdamW", {"weight_decay": 0.3, "fused": True, "amsgrad": True}),
    ("Adadelta", {"weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"fused": True, "lr_decay": 0.1}),
    ("Adamax", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.9, 0.5)}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    ("Rprop", {"lr": 0.01}),
    ("ASGD", {"weight_decay": 0.1, "lambd": 0.01, "t0": 1}),
]


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS, ids=str)
def test_each_formula_of_an_optimizer_gives_the_number(
    name, settings, small, tmp_path, everystep_command
):
    model, x, y = small
    optimizer = getattr(torch.optim, name)(model.parameters(), **({"lr": 0.1} | settings))
    run = trained(model, (x, y), optimizer=optimizer, steps=6, run=tmp_path / "run")
    for number in (1, 6):
        step = run[number]
        asked = ["updates['0.weight'].after[1, 2]"]
        if number > 1:  # the first step makes the state
            asked += [
                f"tensors['{each}']{'[1, 2]' if step.state[each].dim() else ''}"
                for each in step.state
                if each.startswith("optimizer/0.weight/")
            ]
        for expression in asked:
            answer = step.why(expression, terms=ALL)
            if answer.origin == "operation":
                assert answer.formula and answer.recomputed is not None
                assert complaints(answer) == []
    _, out, _ = everystep_command("step", run.directory, "6", "--json")
    update = next(each for each in json.loads(out)["updates"] if each["parameter"] == "0.weight")
    expected = run[6].updates["0.weight"].after[1, 2].item()
    (group,) = optimizer.param_groups
    assert assigned(update["operators"], run[6], group) == pytest.approx(expected, rel=1e-5)


#: What the formula of an update calls as torch does.
CALLS = {
    "f_addcdiv": lambda x, a, b, value=1: x + value * a / b,
    "f_addcmul": lambda x, a, b, value=1: x + value * a * b,
    "f_lerp": lambda x, end, weight: x + weight * (end - x),
    "f_maximum": max,
}


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "RMSprop"])
def test_a_formula_without_decay_is_not_shown_once_there_is_a_decay(
    name, small, tmp_path, everystep_command
):
    model, x, y = small
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number, (inputs, targets) in enumerate(recording.steps([(x, y)] * 5), 1):
            if number == 3:
                optimizer.param_groups[0]["weight_decay"] = 0.5
            recording.log(loss=descend(optimizer, (model(inputs) - targets).square().mean()))
    for number in (2, 4):
        step = recording.run[number]
        _, out, _ = everystep_command("step", recording.run.directory, str(number), "--json")
        updates = {each["parameter"]: each["operators"] for each in json.loads(out)["updates"]}
        lines = updates["0.weight"]
        expected = step.updates["0.weight"].after[1, 2].item()
        (group,) = optimizer.param_groups
        if not lines[0].endswith("as the run began"):
            assert assigned(lines, step, group) == pytest.approx(expected, rel=1e-5)
        else:
            assert number == 4


def assigned(lines, step, group):
    """Return what the formula of an update, one assignment after the other, makes of a parameter."""
    own = "optimizer/0.weight/"
    tensors = {"param": step.parameters["0.weight"], "grad": step.gradients["0.weight"]}
    tensors |= {key.removeprefix(own): of for key, of in step.state.items() if key.startswith(own)}
    names = {key: of[1, 2].double().item() if of.dim() else of.item() for key, of in tensors.items()}
    for key in ("betas", "etas", "step_sizes"):
        parts = {"betas": ("beta1", "beta2"), "etas": ("etaminus", "etaplus")}
        names |= dict(zip(parts.get(key, ("smallest", "largest")), group.get(key, ()), strict=False))
    names |= {key: of for key, of in group.items() if isinstance(of, int | float)} | {"t": step.number}
    for line in lines:
        left, _, right = line.rpartition(" = ")
        text = right.replace("param.grad", "grad").replace("²", " ^ 2")
        names[left.strip() or "param"] = float(evaluated(text, CALLS | names))
    return names["param"]
