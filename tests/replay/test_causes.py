"""Why two runs part: in an operation's arguments, its settings, its tensors, or in nothing at all."""

import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from benchmarks.faults.kinds.judging import all_kinds, judged
from benchmarks.faults.kinds.sides import Training, with_module
from hypothesis import given
from hypothesis import strategies as st
from tests.descent import descend, looped, of_table
from torch import nn
from torch.nn import functional
from torch.optim import AdamW

import everystep
from everystep.step.state import Size, distance, same_bits, size_of_difference
from everystep.views.comparisons import diff_sentence, listed

#: Of the kinds in benchmarks/faults, one or two of each family.
QUICK = """
GELU approximate
Dropout p
a wider layer
a weight by an ulp
a scheduler or none
two rows swapped
lr of a fork
seed of a fork
threads
dtype of one layer
an argument that no attribute shows
running statistics
reduction
label_smoothing from 0.1
class weights
AdamW eps, 1e-08 | 1.1e-08
Adam betas, (0.9, 0.999) | (0.8, 0.999)
AdamW weight_decay, by Python
gamma of StepLR
a data cell in batches
batch_size, 6 | 7
one random number more before
seed of an experiment
p and eps: p
approximate of a function
lr of the second optimizer
another operation, which nothing says
identical loops
""".strip().splitlines()
KINDS = {kind.name: kind for kind in all_kinds()}


@pytest.mark.sweep(every=8)
@pytest.mark.parametrize("name", QUICK)
def test_step_operation_and_cause_are_those_that_were_planted(name):
    judgement = judged(KINDS[name])
    assert judgement.is_right, judgement.said


def test_a_cause_is_the_same_in_text_sentence_and_data():
    one, other = (Training(optimizer=partial(AdamW, eps=eps))() for eps in (1e-8, 1.1e-8))
    found = one.diff(other, progress=False)
    cause = "AdamW: eps 1e-08 | 1.1e-08"
    assert f"cause       {cause}" in found.to_text().splitlines()
    assert f"aten.add_.Tensor, update; cause: {cause}" in diff_sentence(found)
    data = found.data()
    assert data["operation"]["causes"] == [cause]
    assert data["asked"] == [{"name": "optimizer AdamW.eps", "values": ["1e-08", "1.1e-08"]}]


def test_an_optimizer_that_keeps_more_is_named(tmp_path):
    def trained(name, **settings):
        torch.manual_seed(0)
        model, adam = nn.Linear(3, 2), partial(torch.optim.Adam, lr=0.1, **settings)
        batches = [torch.randn(4, 3) for _ in range(3)]
        return looped(
            model, batches, lambda model, x: model(x).pow(2).mean(), run=tmp_path / name, optimizer=adam
        )

    one, other = trained("one"), trained("other", amsgrad=True)
    assert one.diff(other, progress=False).operation.causes == ["Adam: amsgrad False | True"]
    assert other.diff(one, progress=False).operation.causes == ["Adam: amsgrad True | False"]


# What was asked for.


def test_models_are_listed_by_leaf():
    one = Training(with_module(nn.Tanh, partial(nn.Dropout, 0.2)))()
    other = Training(with_module(nn.ReLU, partial(nn.Dropout, 0.21), nn.Tanh))()
    lines = [str(each) for each in listed(one.diff(other, progress=False))]
    assert lines == [
        "model.1  Tanh() | ReLU()",
        "model.2 Dropout.p  0.2 | 0.21",
        "model.3  Linear(in_features=8, out_features=3, bias=True) | Tanh()",
        "model.4  None | Linear(in_features=8, out_features=3, bias=True)",
    ]


def test_a_table_is_listed_by_row_and_name_of_column(tmp_path):
    lines = ["age,height,weight", *(f"{20 + row},{150 + 3 * row},{50 + 2 * row}" for row in range(12))]
    runs = []
    for name, weight in (("one", "54"), ("other", "55")):
        lines[3] = f"22,156,{weight}"
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines))
        experiment = of_table(path, "weight", "Linear(2, 1)")
        runs.append(everystep.train_experiment(experiment, progress=False))
    found = runs[0].diff(runs[1], progress=False)
    assert [str(each) for each in listed(found) if "path" not in each.name] == [
        "data.y[2, 0]  54.0 | 55.0"
    ]
    (tensor,) = found.data()["data_tensors"]
    assert (tensor["tensor"]["name"], tensor["rows"], tensor["columns"]) == ("y", [2], [0])


# How far.


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "other", "size", "text"),
    [
        ([1.0, 2.0], [1.0, 2.0000002], Size(1), "by at most 1 unit in the last place"),
        ([1.0], [1.0000004], Size(3), "by at most 3 units in the last place"),
        ([0.0, 4.0], [0.5, 4.0], Size(1_056_964_608, 0.5, 0.125),
         "by at most 0.5 (0.12 of the largest)"),
        ([1.0], [-1.0], Size(2_130_706_432, 2.0, 2.0), "by at most 2 (2 of the largest)"),
        ([NAN, 8.0], [NAN, 6.0], Size(None, 2.0, 0.25), "by at most 2 (0.25 of the largest)"),
        ([NAN, 8.0], [1.0, 6.0], Size(None), ""),
        ([INFINITY, 8.0], [1.0, 6.0], Size(1_073_741_824), ""),
        ([], [], Size(), ""),
    ],
)  # fmt: skip
def test_far_apart_numbers_are_measured_as_numbers(one, other, size, text):
    found = size_of_difference(torch.tensor(one), torch.tensor(other))
    assert found == size and str(found) == text


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


def place(number, dtype):
    """The place of a float among those of its dtype: the bits of its magnitude, as Python's integer."""
    bits = int.from_bytes(torch.tensor([number], dtype=dtype).view(torch.uint8).tolist(), "little")
    width = 8 * dtype.itemsize
    if torch.finfo(dtype).min >= 0:
        return bits
    magnitude = bits & ((1 << (width - 1)) - 1)
    return -magnitude if bits >> (width - 1) else magnitude


@given(st.sampled_from(DTYPES), st.data())
def test_the_units_between_two_floats_are_exact(dtype, data):
    numbers = st.floats() | st.sampled_from([0.0, -0.0, 2.0, -2.0, INFINITY, -INFINITY])
    drawn = data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4))
    one, other = (torch.tensor(side, dtype=torch.float64).to(dtype) for side in zip(*drawn, strict=True))
    pairs = list(zip(one.double().tolist(), other.double().tolist(), strict=True))
    units = distance(one, other)
    if any(math.isnan(each) for pair in pairs for each in pair):
        assert units is None
    else:
        assert units == max(abs(place(a, dtype) - place(b, dtype)) for a, b in pairs)
    if not same_bits(one, other):
        assert size_of_difference(one, other).units == units


def test_whole_numbers_have_a_size_too():
    assert size_of_difference(torch.tensor([3, 8]), torch.tensor([3, 6])) == Size(None, 2.0, 0.25)
    assert size_of_difference(torch.tensor([True]), torch.tensor([False])) == Size()
    large = torch.tensor([2**62, 1]), torch.tensor([2**62 + 1, 1])
    assert size_of_difference(*large).absolute == 1.0


# Loops as people write them: what the command calls the cause.


def small():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def usual(model, optimizer, x, y):
    """A step: forward, loss, zero_grad, backward, update."""
    return descend(optimizer, functional.mse_loss(model(x), y))


def loop(name, *, step=usual, model=small, after=lambda number, model: None, steps=6, batches=None):
    """Record a loop. step: takes one; after: called after each step, outside of it."""
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = batches or [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(steps)]
    number = 0
    with everystep.record(run=name, model=net, optimizer=optimizer) as recording:
        for first in range(0, len(batches), 2):
            for x, y in recording.steps(batches[first : first + 2]):
                recording.log(loss=step(net, optimizer, x, y))
            number = first + 2
            after(number, net)


def both(step, one, other, **options):
    """Record two loops: the first argument of their steps is another one."""
    for name, first in (("one", one), ("other", other)):
        loop(name, step=partial(step, first), **options)


@pytest.fixture
def said(everystep_command):
    """Return the lines of a diff of the runs `one` and `other` that begin with a word."""

    def lines(label="cause", *options):
        code, out, err = everystep_command("diff", "one", "other", *options)
        assert not err and (code == 1 or "is identical" in out)
        own = [line for line in out.splitlines() if line.startswith(f"{label} ")]
        return [line.removeprefix(label).strip() for line in own]

    return lines


def edited(number, model):
    if number == 4:
        with torch.no_grad():
            model[3].weight[1, 2] += 0.01


def loaded(number, model):
    if number == 4:
        torch.manual_seed(1)
        model.load_state_dict(small().state_dict())


def evaluated(number, model):
    if number == 4:
        with torch.no_grad():
            model(torch.ones(3, 4))


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("after", "cause"),
    [
        (edited, "3.weight[1, 2] of state 4: "),
        (loaded, "0.bias of state 4: 8 of 8 numbers, by at most "),
        (evaluated, "1.num_batches_tracked of state 4: 4 | 5; "),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:.*outside of a step")
def test_a_state_that_was_changed_outside_of_a_step_is_said_to_be(said, after, cause):
    loop("one")
    loop("other", after=after)
    causes = said()
    assert causes and all(
        each.endswith("; changed outside of a step, after step 4, in other") for each in causes
    )
    assert causes[0].startswith(cause)


def two_products(swaps, model, optimizer, x, y):
    """A step that multiplies what two layers return, in either order."""
    q, k = model[0](x), model[1](x)
    if swaps:
        q, k = k, q
    return descend(optimizer, functional.mse_loss((q @ k.T)[:, :3], y))


def test_a_product_of_the_same_tensors_in_another_order_is_said_to_be(said):
    layers = lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])  # noqa: E731
    both(two_products, False, True, model=layers)
    assert not said("input")
    q, k = "#0 addmm of 0", "#1 addmm of 1"
    assert said() == [f"different inputs: {q}, {k} transposed | {k}, {q} transposed"]


def adversaries(detaches, model, optimizer, x, y):
    """A step of two networks, of which the first may get no gradient by the loss of the second."""
    fake = model[0](x)
    return descend(optimizer, functional.softplus(model[1](fake.detach() if detaches else fake)).mean())


def test_a_detach_that_was_forgotten_is_another_operation_not_another_layout(said):
    def networks():
        judge = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        return nn.ModuleList([nn.Linear(4, 4), judge])

    both(adversaries, True, False, model=networks)
    assert not said("input")
    layer = "leaky_relu_backward of 1.1"
    (cause,) = said()
    assert re.fullmatch(
        rf"different inputs: #\d+ {layer} transposed, #0 addmm of 0 \| #\d+ {layer}, 1.0.weight.*", cause
    )


def clipped(first, model, optimizer, x, y):
    """A step that clips the gradients of the parameters from one on."""
    loss = functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([*model.parameters()][first:], 0.01, foreach=True)
    optimizer.step()
    return loss


def test_of_a_list_of_tensors_those_are_named_that_only_one_run_has(said):
    both(clipped, 0, 1)
    assert not said("input") and not said("result")
    assert said() == ["different inputs: gradient of 0.weight only in one"]


def accumulated(to_none, zeroes, model, optimizer, x, y):
    """A step that may forget to drop the gradients of the step before."""
    if zeroes:
        optimizer.zero_grad(set_to_none=to_none)
    loss = functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("to_none", [False, True])
def test_a_zero_grad_that_is_missing_is_called_by_its_name(said, to_none):
    both(partial(accumulated, to_none), True, False)
    assert said() == ["zero_grad: one drops the gradients of step 1, and other adds to them"]


def test_an_optimizer_that_does_not_step_is_named_once(said):
    def step(skipped, model, optimizer, x, y):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        if not skipped:
            optimizer.step()
        return loss

    both(step, False, True)
    assert said() == ["another operation; only one has a step of SGD"]


def test_parameters_that_only_one_run_trains_are_named(said):
    loop("one", model=lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)))
    loop("other", model=lambda: nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 3)))
    (cause,) = said()
    assert "; only one computes the gradient of 0.weight, 0.bias; " in cause


def test_settings_of_torch_s_own_optimizer_are_named_where_an_argument_is_computed_from_them(said):
    def trained(name, every):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = AdamW([{"params": [each]} for each in model.parameters()], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, every)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        with everystep.record(run=name, **parts) as recording:
            for x in recording.steps([torch.randn(6, 4) for _ in range(4)]):
                recording.log(loss=descend(optimizer, model(x).square().mean()))
                scheduler.step()

    trained("one", 2)
    trained("other", 3)
    assert said() == [
        "one or more of: AdamW: lr 0.010000000000000002 | 0.1; AdamW: lr[1] 0.010000000000000002 | 0.1",
        "scheduler StepLR: step_size 2 | 3",
        "other of aten.mul_ 0.9999 | 0.999",
    ]


def test_a_rate_is_named_once_whatever_the_part_with_it_is_called(said):
    for name, lr in (("one", 0.5), ("other", 0.25)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        opt = torch.optim.SGD(model.parameters(), lr=lr)
        with everystep.record(run=name, model=model, opt=opt) as recording:
            for x in recording.steps(torch.randn(3, 6, 4)):
                recording.log(loss=descend(opt, model(x).square().mean()))
    assert said() == ["opt SGD: lr 0.5 | 0.25"]


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda given, y, **how: functional.cross_entropy(given, y.argmax(1), **how),
         "reduction of aten.nll_loss_forward 'mean' | 'sum'"),
        (functional.smooth_l1_loss, "reduction of aten.smooth_l1_loss 'mean' | 'sum'"),
        (functional.l1_loss,
         "another operation; only one has mean (loss), div (backward); only other has sum (loss)"),
    ],
)  # fmt: skip
def test_a_reduction_is_called_by_its_name(said, loss, cause):
    def step(reduction, model, optimizer, x, y):
        return descend(optimizer, loss(model(x), y, reduction=reduction))

    both(step, "mean", "sum", steps=2)
    assert said() == [cause]


def masked_by_numpy(seed):
    generator = np.random.default_rng(seed)
    return lambda x: x * torch.from_numpy((generator.random(x.shape) > 0.3).astype("float32"))


def noisy(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x + torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("changed", [masked_by_numpy, noisy])
@pytest.mark.filterwarnings("ignore:.*takes a Generator")
def test_a_tensor_that_is_neither_of_the_batch_nor_of_the_state_is_said_to_be(said, changed):
    def step(change, model, optimizer, x, y):
        return usual(model, optimizer, change(x), y)

    both(step, changed(1), changed(2))
    (cause,) = said()
    assert cause.startswith("a tensor from outside of the step: ")
    assert "; it was made before, or by code that no program records, such as NumPy" in cause
    assert cause.endswith("(aten.randn.generator takes a Generator)") == (changed is noisy)


def halves(module, given, result):
    return result * 0.5


class Halves:
    def __call__(self, *given):
        return given[-1] * 0.5


@pytest.mark.parametrize(
    ("hooks", "cause"),
    [
        (lambda model: model[2].register_forward_hook(halves), "2 Tanh: forward hook None | 'halves'"),
        (lambda model: model[2].register_forward_hook(lambda *given: given[-1] * 0.5),
         "2 Tanh: forward hook None | '<lambda> in line ... of test_causes.py'"),
        (lambda model: model[3].weight.register_hook(Halves()),
         "3 Linear: weight 'float32' | 'float32, hook Halves'"),
    ],
    ids=["function", "lambda", "gradient"],
)  # fmt: skip
def test_a_hook_is_called_by_its_name(said, hooks, cause):
    def model():
        made = small()
        hooks(made)
        return made

    loop("one")
    loop("other", model=model)
    (said_cause,) = said()
    start, end = ([*f"module {cause}".split("..."), ""])[:2]
    assert f"; perhaps because of {start}" in said_cause or said_cause.startswith(start)
    assert said_cause.endswith(end)
    assert "Tanh.arguments" not in str(said("experiments"))


class OwnNetwork(nn.Sequential):
    pass


class SameNetwork(OwnNetwork):
    pass


def test_another_name_of_a_class_is_no_difference_of_the_runs(everystep_command):
    for name, kind in (("one", OwnNetwork), ("other", SameNetwork)):
        loop(name, model=lambda: kind(nn.Linear(4, 3)))  # noqa: B023
    code, out, _ = everystep_command("diff", "one", "other")
    assert code == 0 and "OwnNetwork() | SameNetwork()" in out
    assert out.endswith("the runs are bit-identical; only names differ\n")


def test_another_file_with_the_same_data_is_no_difference_of_the_runs(tmp_path, everystep_command):
    columns = {"age": range(12), "height": range(50, 74, 2), "weight": range(9, 45, 3)}
    for name, order in (("one", ["age", "height", "weight"]), ("other", ["weight", "height", "age"])):
        lines = [",".join(order), *(",".join(str(columns[c][i]) for c in order) for i in range(12))]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines))
        experiment = of_table(path, "weight", "Linear(2, 1)", data={"features": ["age", "height"]})
        everystep.train_experiment(experiment, run=name, progress=False)
    code, out, _ = everystep_command("diff", "one", "other")
    assert code == 0 and "data.path" in out and "only names differ" in out


def batches_of(count, change=lambda batches: None):
    torch.manual_seed(7)
    made = [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(count)]
    change(made)
    return made


def reordered(batches):
    x, y = batches[2]
    order = [0, 4, 2, 1, 3, 5]
    batches[2] = x[order], y[order]


def test_rows_that_moved_in_a_batch_are_said_to_have_moved(said):
    loop("one", batches=batches_of(4))
    loop("other", batches=batches_of(4, reordered))
    assert said() == ["batch: the same rows of x in another order"]
    assert said("rows") == ["1 and 4 at position 1, 3 and 1 at position 3, 4 and 3 at position 4"]


def far(batches):
    batches[4] = batches[4][0], batches[4][1] * 1e4


def test_the_first_state_that_differs_is_named_where_it_is_that_of_a_later_step(said, everystep_command):
    def step(norm, model, optimizer, x, y):
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm, foreach=False)
        optimizer.step()
        return loss

    both(step, 100.0, 200.0, batches=batches_of(6, far))
    assert said() == ["other of aten.mul 100.0 | 200.0"]
    assert said("operation")[0].endswith("of step 1")
    assert said("state") == ["no parameter and no buffer differs before state 5, in which 0.weight does"]
    assert said("losses")[0].startswith("differ from step 6 on")
    data = json.loads(everystep_command("diff", "one", "other", "--json")[1])
    assert data["first_state"] == {"state": 5, "name": "0.weight", "last": 6}


def evaluating(kind):
    def step(after, model, optimizer, x, y):
        model.count = getattr(model, "count", 0) + 1
        if after is not None and model.count > after:
            model.eval()
        return usual(model, optimizer, x, y)

    both(step, None, 3, model=lambda: nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 3)))


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (partial(nn.BatchNorm1d, 8),
         "module 1 BatchNorm1d: training of aten.native_batch_norm True | False"),
        (partial(nn.Dropout, 0.2),
         "module 1 Dropout, which does nothing in eval mode, computes only in one"),
    ],
    ids=["BatchNorm", "Dropout"],
)  # fmt: skip
def test_a_module_that_is_in_eval_mode_is_named(said, kind, cause):
    evaluating(kind)
    (found,) = said()
    assert found.startswith(f"another operation; {cause}; only one has ")
    assert said("operation")[0].endswith("of step 4")


@pytest.mark.parametrize(
    ("kind", "settings", "causes"),
    [
        (nn.RReLU, (0.1, 0.2), ["module 0 RReLU: lower 0.1 | 0.2",
                                "module 0 RReLU: training of aten.rrelu_with_noise True | False"]),
        (nn.Dropout, (0.2, 0.3), ["which does nothing in eval mode, computes only in one",
                                  "module 0 Dropout: p 0.2 | 0.3"]),
    ],
)  # fmt: skip
def test_a_mode_that_the_loop_sets_is_named_next_to_a_setting_that_differs_too(
    said, kind, settings, causes
):
    def step(is_evaluated, model, optimizer, x, y):
        model.train(not is_evaluated)  # within the step: the settings are those before it
        return usual(model, optimizer, x, y)

    for name, setting in zip(("one", "other"), settings, strict=True):
        module = partial(kind, setting)
        loop(
            name,
            step=partial(step, name == "other"),
            model=lambda module=module: nn.Sequential(module(), nn.Linear(4, 3)),
        )
    found = "; ".join(said())
    assert all(each in found for each in causes), found


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_another_shape_of_the_target_is_named(said):
    def step(is_flat, model, optimizer, x, y):
        return usual(model, optimizer, x, y[:, 0] if is_flat else y[:, :1])

    both(step, False, True, model=lambda: nn.Linear(4, 1))
    (cause,) = said()
    assert not said("input")
    assert cause.startswith(
        "different inputs: #0 addmm (6, 1), batch.y (6, 1) | #0 addmm (6, 6), batch.y (6, 6)"
    )


def test_an_image_that_lies_otherwise_in_memory_is_said_to_lie_channels_last(said):
    def images(last):
        torch.manual_seed(5)
        made = [torch.randn(4, 3, 8, 8) for _ in range(3)]
        return [
            (x.to(memory_format=torch.channels_last) if last else x, torch.zeros(4, 2)) for x in made
        ]

    def net():
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AvgPool2d(4), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, 2))

    for name, last in (("one", False), ("other", True)):
        loop(name, model=net, batches=images(last))
    causes = said()
    if not causes:
        pytest.skip("bits do not depend on the layout here")
    assert all(each.endswith(" in memory: contiguous | channels_last") for each in causes)
    assert causes[-1].startswith("batch.x in memory")


def test_a_conversion_is_named_with_what_it_converts_to(said):
    def step(dtype, model, optimizer, x, y):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return usual(model, optimizer, x, y)

    both(step, None, torch.bfloat16, model=lambda: nn.Linear(4, 3))
    assert said()[0].startswith("another operation; only other has _to_copy to bfloat16 (forward) ")
