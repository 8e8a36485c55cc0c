"""Faults put into one of two runs are found: in which step, at which operation, and why."""

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.descent import descend, looped
from tests.sealing import sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import by_train, descent, mlp, momentum, new_training
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import everystep
from everystep import numerics
from everystep.errors import DamageWarning
from everystep.experiment.batches import Batches
from everystep.numerics import Numerics
from everystep.recording.texts import shortest
from everystep.step.state import StateDifference
from everystep.views.comparisons import diff_sentence

STEPS = 30
#: The seed that `new_training` leaves, by which batches are drawn.
SEED = 0


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(change=lambda made: None, *, steps=STEPS, model=None, loss=None, optimizer=None, **options):
    scheduler = options.pop("scheduler", None)
    made = new_training(model, loss, optimizer, scheduler)
    with torch.no_grad():
        change(made)
    return by_train(made, steps=steps, **options)


# Faults.


def ulp(name, *place):
    """Put a number of a parameter one up."""

    def change(made):
        tensor = made.model.get_parameter(name)
        tensor[place] = torch.nextafter(tensor[place], torch.tensor(math.inf))

    return change


def swap(one, other):
    def change(made):
        for tensor in (made.x, made.y):
            tensor[[one, other]] = tensor[[other, one]]

    return change


def first_step_with(*rows):
    """Return the first step with one of the rows in its batch of 6, and where, as diff reports it."""
    batches = Batches(20, 6, SEED)
    for step in range(1, 5):
        seen = batches.indices(step).tolist()
        if set(rows) & set(seen):
            return step, [(place, row, row) for place, row in enumerate(seen) if row in rows]
    raise AssertionError("every row is in some batch")


def test_the_order_of_the_runs_does_not_matter():
    one, other = train(batch_size=6), train(swap(3, 7), batch_size=6)
    pair = one.diff(other, progress=False), other.diff(one, progress=False)
    for left, right in zip(
        *(found.operation.results + found.operation.inputs for found in pair), strict=True
    ):
        assert left._replace(values=[(b, a) for a, b in left.values]) == right
    assert pair[0].operation.step == pair[1].operation.step
    assert pair[0].loss[1:] == pair[1].loss[:0:-1]


def test_what_differs_is_what_differs_by_hand():
    one, other = train(), train(ulp("0.weight", 1, 2))
    found = one.diff(other, progress=False)
    models = [new_training() for _ in range(2)]
    with torch.no_grad():
        ulp("0.weight", 1, 2)(models[1])
        a, b = (made.model[0](made.x) for made in models)
        weights = [float(made.model[0].weight[1, 2]) for made in models]
    assert found.states == (StateDifference(0, "parameters/0.weight", 1, 1),)
    assert found.common_state is None
    (result,) = found.operation.results
    different = torch.nonzero(a != b)
    assert 0 < result.elements == len(different) and result.of == 160
    assert result.positions == [tuple(place) for place in different[:10].tolist()]
    assert result.values == [(float(a[p]), float(b[p])) for p in result.positions]
    integers = a.view(torch.int32).long() - b.view(torch.int32).long()
    assert result.largest == int(integers.abs().max())
    (given,) = found.operation.inputs  # the weight as addmm takes it: transposed
    assert (given.elements, given.of, given.positions, given.largest) == (1, 32, [(2, 1)], 1)
    assert given.values == [tuple(weights)]
    losses = [run.losses["loss"].to_list() for run in (one, other)]
    # Kernels of another torch may round the difference away before it reaches a loss.
    first = next((i for i, (p, q) in enumerate(zip(*losses, strict=True)) if p != q), None)
    assert found.loss == (first if first is None else (first + 1, losses[0][first], losses[1][first]))


# Runs that are the same, in part or as a whole.


@pytest.mark.parametrize("options", [{"model": dropout, "batch_size": 6}, {"engine": "eager"}])
def test_identical_runs_are_the_same(options):
    found = train(**options).diff(train(**options), progress=False)
    assert found.is_same
    assert found == found.__class__(
        names=("sequential-1", "sequential-2"),
        experiments={},
        numerics={},
        steps=(STEPS, STEPS),
        loss=None,
        common_state=STEPS,
        states=(),
        operation=None,
        problems=(),
    )


@pytest.mark.parametrize("thorough", [False, True])
def test_a_longer_run_of_the_same_is_not_the_same(thorough):
    found = train(steps=30).diff(train(steps=20), thorough=thorough, progress=False)
    assert not found.is_same
    assert (found.steps, found.loss, found.states, found.operation) == ((30, 20), None, (), None)
    what = "result of every operation" if thorough else "loss and every common snapshot"
    same = f"every {what} up to step 20 is identical; one run is longer"
    assert found.to_text().endswith(same + ("" if thorough else "; --thorough compares every operation"))


def test_nan_is_the_same_as_nan():
    one, other = (train(optimizer=partial(SGD, lr=1e30)) for _ in range(2))
    assert math.isnan(one.losses["loss"][-1])
    assert one.diff(other, progress=False).is_same


def test_zero_is_not_minus_zero():
    def zero(made, value=0.0):
        made.model[0].bias[3] = value

    found = train(zero).diff(train(partial(zero, value=-0.0)), progress=False)
    assert not found.is_same and found.loss is None
    assert [(each.state, each.tensor, each.elements) for each in found.states] == [
        (0, "parameters/0.bias", 1)
    ]


def test_settings_of_cuda_differ_only_where_it_computes():
    known = Numerics.read(torch.device("cpu"))
    assert not any("cudnn" in name for name in known.settings)
    other = known.model_copy(update={"cublas_workspace_config": "none"})
    assert known.differences(other) == {}
    pair = [
        each.model_copy(
            update={"device": "NVIDIA H100", "settings": {"torch.backends.cudnn.enabled": on}}
        )
        for each, on in ((known, True), (other, False))
    ]
    assert {*pair[0].differences(pair[1])} == {"cublas_workspace_config", "torch.backends.cudnn.enabled"}


def by_chosen_kernels(number, model, x, y):
    """A step with kernels that settings of the process choose."""
    images = nn.functional.conv2d(x.reshape(2, 4, 2, 2), torch.full((4, 4, 2, 2), 0.1), padding=1)
    mixed = nn.functional.scaled_dot_product_attention(images, images, images)
    return {"loss": mixed.pow(2).mean() + nn.functional.mse_loss(model(x), y)}


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch knows one way")
def test_a_precision_that_is_set_in_the_new_way_is_recorded_named_and_in_force(everystep_command):
    before = Numerics.read(torch.device("cpu"))
    train(steps=4)
    with numerics.in_force():
        # torch refuses to give it the name that it had in the old way.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        train(steps=4)
    assert Numerics.read(torch.device("cpu")) == before
    _, out, _ = everystep_command("diff", "sequential-1", "sequential-2")
    assert "torch.backends.mkldnn.matmul.fp32_precision  ieee | bf16" in out
    code, out, _ = everystep_command("verify", "sequential-2")
    assert code == 0 and "numerics" not in out


def test_settings_of_torch_are_recorded_named_and_in_force_in_a_replay(everystep_command):
    before = Numerics.read(torch.device("cpu"))
    recorded_loop("runs/one", by_chosen_kernels)
    with numerics.in_force():  # and as before afterwards
        torch.backends.mkldnn.enabled = False
        torch.backends.nnpack.set_flags(False)
        torch.set_float32_matmul_precision("medium")
        torch.backends.mha.set_fastpath_enabled(False)
        recorded_loop("runs/other", by_chosen_kernels)
        torch.backends.cuda.enable_flash_sdp(False)
        recorded_loop("runs/slow", by_chosen_kernels)
    assert Numerics.read(torch.device("cpu")) == before
    code, out, _ = everystep_command("diff", "runs/one", "runs/other")
    for line in (
        "torch.set_float32_matmul_precision  highest | medium",
        "torch.backends.mkldnn.enabled  True | False",
        "torch.backends.nnpack.set_flags  True | False",
        "torch.backends.mha.set_fastpath_enabled  True | False",
    ):
        assert line in out
    for name in ("other", "slow"):
        code, out, _ = everystep_command("verify", f"runs/{name}")
        assert code == 0 and "replays bit for bit" in out and "numerics" not in out
    assert Numerics.read(torch.device("cpu")) == before
    code, out, _ = everystep_command("diff", "runs/other", "runs/slow")
    assert "_scaled_dot_product_flash_attention_for_cpu" in out
    cause = "perhaps because of torch.backends.cuda.enable_flash_sdp True and False"
    assert re.search(rf"cause       another operation; .*{cause}\n", out)


# What shows in no loss.


def frozen():
    model = mlp()
    model[2].bias.requires_grad_(False)
    return model


def small_bias(made, fault=lambda made: None):
    """Give a bias that is so small that an ulp of it is rounded away."""
    made.model[2].bias.fill_(1e-12)
    fault(made)


def only_weights(parameters, **options):
    return momentum([p for p in parameters if p.requires_grad], **options)


def test_a_difference_that_is_rounded_away_everywhere_is_found_by_snapshots():
    faulty = partial(small_bias, fault=ulp("2.bias", 0))
    options = {"model": frozen, "optimizer": only_weights}
    found = train(small_bias, **options).diff(train(faulty, **options), progress=False)
    assert not found.is_same
    assert found.loss is None and found.operation is None and found.common_state is None
    assert found.states == (StateDifference(0, "parameters/2.bias", 1, 1),)
    assert diff_sentence(found).endswith("up to step 30; parameters/2.bias of state 0 differs.")
    assert "identical up to step 30" in found.to_text()
    assert found.to_text().endswith("the runs differ")


def test_a_difference_that_only_the_update_keeps_is_found_at_the_update():
    faulty = partial(small_bias, fault=ulp("2.bias", 0))
    options = {"optimizer": partial(descent, lr=1e-20)}
    found = train(small_bias, **options).diff(train(faulty, **options), progress=False)
    assert found.loss is None and not found.is_same
    operation = found.operation
    assert (operation.step, operation.one.operation.phase) == (1, "update")
    assert operation.one.operation.operator == "aten.sub_.Tensor"
    assert [name for name, *_ in operation.results] == ["parameter/2.bias"]
    assert [(each.name, each.largest) for each in operation.inputs] == [("parameter/2.bias", 1)]
    assert diff_sentence(found).endswith("update; cause: 2.bias[0] of state 0: 1e-12 | 1.0000001e-12.")
    unknown = replace(found, operation=replace(operation, causes=[]))
    assert diff_sentence(unknown).endswith("aten.sub_.Tensor, update; its input 2.bias differs.")


@pytest.mark.parametrize("thorough", [False, True])
def test_a_difference_that_is_gone_after_the_first_step_is_found_in_it(thorough):
    def large(made, fault=lambda made: None):
        made.y *= 1e8
        made.model[2].weight.zero_()
        fault(made)

    # The update is so large that an ulp of what it is added to is rounded away.
    options = {"steps": 2, "optimizer": partial(descent, lr=1.0)}
    faulty = partial(large, fault=ulp("2.bias", 0))
    found = train(large, **options).diff(train(faulty, **options), thorough=thorough, progress=False)
    assert found.states == (StateDifference(0, "parameters/2.bias", 1, 1),)
    operation = found.operation
    assert (operation.step, operation.one.operation.operator) == (1, "aten.addmm.default")
    assert operation.one.operation.module == "2"


def test_what_shows_in_no_loss_and_no_snapshot_is_found_thoroughly(monkeypatch):
    def model():
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        return model.requires_grad_(False).append(nn.Linear(2, 2))

    def negative(made, by=0.0):
        made.model[0].weight.zero_()[:, 0] = 1.0
        made.x[:] = -made.x.abs() - 2
        made.x[11, 0] -= by

    one = train(negative, model=model, optimizer=only_weights, batch_size=6)
    other = train(partial(negative, by=1.0), model=model, optimizer=only_weights, batch_size=6)
    unasked = one.diff(other, progress=False)  # where that takes a moment
    monkeypatch.setattr("everystep.answers.diff.THOROUGH_SECONDS", 0.0)
    quick, thorough = (one.diff(other, thorough=asked, progress=False) for asked in (False, True))
    assert quick.operation is None and not quick.is_thorough and not quick.is_same
    assert list(quick.experiments) == ["data.digest"]
    assert quick.to_text().endswith("; --thorough compares every operation")
    step, rows = first_step_with(11)
    for found in (unasked, thorough):
        assert not found.is_same and found.loss is None and not found.states
        assert found.operation.step == step and found.operation.rows == rows
        assert found.operation.one.operation.operator == "aten.addmm.default"
        assert {position[0] for position in found.operation.results[0].positions} == {rows[0][0]}


def test_snapshots_bracket_where_two_runs_part(monkeypatch):
    take_snapshots_every(monkeypatch, 8)
    one = train(steps=64)
    other = one.fork(43, lr=0.04, progress=False)
    found = one.diff(other, progress=False)
    common = set(one.snapshots) & set(other.snapshots)
    assert found.common_state == max(step for step in common if step <= 43)
    assert {each.state for each in found.states} == {min(step for step in common if step > 43)}
    assert (found.operation.step, found.loss.step) == (44, 45)


# What cannot be read, or is not as it was.


def test_a_snapshot_that_cannot_be_read_is_named_and_the_rest_found():
    one, other = train(), train(ulp("0.weight", 1, 2))
    path = other.directory / "snapshots" / "000030" / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = one.diff(other, progress=False)
    assert (found.operation.step, found.operation.index) == (1, 0)
    same = train()
    broken = same.directory / "snapshots" / "000030" / "rest.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    fork = one.fork(12, lr=0.04, progress=False)
    found = fork.diff(same, progress=False)
    assert found.operation.step == 13
    assert any("000030/rest.safetensors was changed" in problem for problem in found.problems)


def test_a_state_that_was_altered_is_not_called_identical(everystep_command):
    one, other = train(), train()
    path = other.directory / "snapshots" / "000030" / "parameters.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    found = one.diff(other, progress=False)
    before = max({*one.snapshots} & {*other.snapshots} - {30})
    assert found.common_state == before and "was changed after recording" in found.problems[0]
    assert not found.is_same and not found.is_complete
    code, out, _ = everystep_command("diff", one.directory, other.directory)
    assert code == 1
    assert out.endswith(
        "no loss and no state that could be compared differs; not everything could be compared\n"
    )


def test_a_recorded_loss_that_was_altered_is_no_difference_of_operations():
    one, other = train(), train()
    sql(other.directory, "UPDATE steps SET loss = 1.5 WHERE step = 7")
    with pytest.warns(DamageWarning, match="is damaged"):
        found = one.diff(other, progress=False)
    assert not found.is_same
    assert found.loss == (7, one.losses["loss"][6], 1.5)
    assert found.operation is None
    assert any("sequential-2" in problem and "7" in problem for problem in found.problems)


# The command.


def recorded_loop(name, body, batches=None, kind=nn.Sequential):
    """Six steps of a small network, by a loop that does something else in each."""
    torch.manual_seed(0)
    model = kind(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = batches or [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(6)]
    with everystep.record(run=name, model=model, optimizer=optimizer) as recording:
        for number, (x, y, *_) in enumerate(recording.steps(batches), start=1):
            optimizer.zero_grad()
            logged = body(number, model, x, y)
            logged["loss"].backward()
            optimizer.step()
            recording.log(**logged)
    return recording.run


def plainly(number, model, x, y):
    return {"loss": nn.functional.mse_loss(model(x), y)}


def noisily(seeded_after, number, model, x, y):
    loss = plainly(number, model, x + torch.randn(x.shape), y)
    if number == seeded_after:
        torch.manual_seed(99)
    return loss


LOOPS_THAT_DIFFER = {
    "seed": (
        *(partial(noisily, after) for after in (None, 3)),
        (4, "another random draw: torch's generator was set to a different state by step 4"),
    ),
    "rows": (
        *(lambda n, m, x, y, s=s: plainly(n, m, x[s], y[s]) for s in (slice(0, 4), slice(4, 8))),
        (1, "another part of batch.x"),
    ),
    "part of a parameter": (
        *(
            lambda n, m, x, y, s=s: {"loss": plainly(n, m, x, y)["loss"] + m[0].weight[s].pow(2).sum()}
            for s in (slice(0, 4), slice(4, 8))
        ),
        (1, "another part of 0.weight"),
    ),
    "parameter": (
        *(
            lambda n, m, x, y, i=i: {"loss": plainly(n, m, x, y)["loss"] + m[i].bias.pow(2).sum()}
            for i in (0, 2)
        ),
        (1, "different inputs: 0.bias | 2.bias"),
    ),
}


@pytest.mark.parametrize("name", LOOPS_THAT_DIFFER)
def test_what_a_loop_reads_or_draws_otherwise_is_the_cause(name):
    one, other, (step, cause) = LOOPS_THAT_DIFFER[name]
    found = recorded_loop("runs/one", one).diff(recorded_loop("runs/other", other), progress=False)
    assert (found.operation.step, found.operation.causes) == (step, [cause])


class Net(nn.Sequential):
    pass


class OtherNet(Net):
    pass


def test_a_class_of_your_own_may_be_the_cause_but_need_not_be():
    def one(number, model, x, y):
        return plainly(number, model, x + 2, y)

    def other(number, model, x, y):
        return plainly(number, model, x * 2, y)

    runs = []
    for kind, body in ((Net, one), (OtherNet, other)):
        runs.append(recorded_loop(f"runs/{kind.__name__}", body, kind=kind))
    (cause,) = runs[0].diff(runs[1], progress=False).operation.causes
    calls = "only Net has add (loss); only OtherNet has mul (loss)"
    assert cause.startswith(f"another operation; {calls}; perhaps because of model: Net(")


def test_a_setting_that_is_the_argument_goes_before_one_that_is_what_it_leaves_of_1():
    runs = [
        by_train(new_training(mlp, optimizer=partial(SGD, lr=0.1, momentum=m, dampening=d)), steps=4)
        for m, d in ((0.9, 0.1), (0.8, 0.2))
    ]
    found = runs[0].diff(runs[1], progress=False).operation
    assert found.one.operation.operator.startswith("aten.mul_")
    assert found.causes == ["SGD: momentum 0.9 | 0.8"]


def test_other_measurements_are_a_difference(everystep_command):
    def logging(factor, *given):
        logged = plainly(*given)
        return logged | {"twice": factor * logged["loss"].item()}

    one, other = (recorded_loop(f"runs/{n}", partial(logging, n)) for n in (1, 2))
    found = one.diff(other, progress=False)
    assert not found.is_same and [name for name, _ in found.measured] == ["twice"]
    code, out, _ = everystep_command("diff", one.directory, other.directory)
    assert code == 1 and out.endswith("the runs differ in what was measured: twice\n")
    assert "measured    twice differs from step 1 on: " in out


def test_the_rate_of_a_loop_holds_too_and_what_it_logs_itself_does_not(everystep_command):
    for size in (4, 8):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = SGD(model.parameters(), lr=0.05)
        scheduler = StepLR(optimizer, size)
        with everystep.record(model=model, optimizer=optimizer) as recording:
            for step, x in enumerate(recording.steps([torch.ones(2, 3)] * 12), 1):
                loss = descend(optimizer, model(x).square().mean())
                scheduler.step()
                recording.log(loss=loss)
                if step % 5 == 0:
                    recording.log(momentum=step + size)
    _, out, _ = everystep_command("diff", "loop-1", "loop-2")
    assert "lr differs from step 5 on: 0.005000000000000001 and 0.05\n" in out
    assert "momentum differs from step 5 on: 9.0 and 13.0\n" in out
    found = everystep.open("loop-1").when("momentum > 0", which="all", progress=False)
    assert found.steps == (5, 10)


def lstm(directory, change=lambda model: None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 6, batch_first=True), "head": nn.Linear(6, 3)})
    change(model)
    data = [(torch.randn(12, 7, 6), torch.randn(12, 3)) for _ in range(4)]

    def loss_of(model, batch):
        return nn.functional.mse_loss(model["head"](model["lstm"](batch[0])[0][:, -1]), batch[1])

    return looped(model, data, loss_of, run=directory)


@pytest.mark.sweep
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="LSTMs are not of one kernel here")
def test_the_memory_of_a_kernel_is_not_compared_nor_shown(everystep_command):
    """An LSTM of oneDNN returns a workspace as its fourth result: bytes, not all of them written."""

    def with_another_bias(model):
        with torch.no_grad():
            model["head"].bias[1] += 0.5

    one = lstm("runs/one")
    lstm("runs/other", with_another_bias)
    shutil.copytree("runs/one", "runs/copy")
    code, out, _ = everystep_command("diff", "runs/one", "runs/copy", "--thorough")
    assert code == 0 and out.endswith("the runs are bit-identical\n")
    _, out, _ = everystep_command("diff", "runs/one", "runs/other")
    assert "aten.addmm.default of module head" in out and "rnn_layer" not in out
    layer = next(
        place
        for place, seen in enumerate(one[1].operations)
        if seen.operation.operator == "aten.mkldnn_rnn_layer.default"
    )
    _, out, _ = everystep_command("step", "runs/one", 1, "--phase", "forward")
    assert re.search(rf"#{layer}\.4  [0-9,]+ uint8  no numbers, only memory\n", out)
    _, out, _ = everystep_command("step", "runs/one", 1, "--json")
    content = json.loads(out)
    unset = content["operations"][layer]["results"][3]["tensor"]
    assert content["tensors"][unset].keys() == {"shape", "dtype", "unset"}
    code, _, err = everystep_command("why", "runs/one", 1, f"#{layer}.4[5]")
    assert code == 2 and f"result 4 of operation #{layer} is memory of the kernel" in err
    code, out, _ = everystep_command("rerun", "runs/one", "--mkl", "COMPATIBLE")
    assert code == 0 and "all results are within" in out
    code, _, err = everystep_command("rerun", "runs/one", "--precision", "float64")
    assert code == 2 and "computes in float32 only" in err and "mkldnn.enabled = False" in err


def test_noise_that_nothing_writes_is_not_compared(everystep_command):
    def evaluating(number, model, x, y):
        return plainly(number, model, nn.functional.rrelu(x, training=False), y)

    recorded_loop("runs/one", evaluating)
    shutil.copytree("runs/one", "runs/copy")
    code, out, _ = everystep_command("diff", "runs/one", "runs/copy", "--thorough")
    assert code == 0 and out.endswith("the runs are bit-identical\n")


def test_numbers_that_an_operation_overwrites_are_not_among_what_differs():
    def copying(kept, number, model, x, y):
        kept.copy_(x)
        return plainly(number, model, kept * 1, y)

    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batches = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(3)]
        runs.append(recorded_loop(f"runs/{seed}", partial(copying, torch.randn(8, 4)), batches))
    found = runs[0].diff(runs[1], progress=False).operation
    assert found.one.operation.operator == "aten.copy_.default"
    assert [each.name for each in found.inputs] == ["x"]


@pytest.mark.parametrize("place", [0, 2], ids=["read", "not read"])
def test_a_batch_that_differs_without_a_different_result_is_found_thoroughly(place, everystep_command):
    def batches(weight):
        torch.manual_seed(1)
        made = [(torch.randn(8, 4), torch.randn(8, 3), torch.ones(8)) for _ in range(6)]
        made[2][place][3] = -weight
        return made

    def body(number, model, x, y):
        return plainly(number, model, x.relu(), y)

    one, other = (recorded_loop(f"runs/{n}", body, batches(n)) for n in (1.0, 2.0))
    assert one.diff(other, progress=False).is_same
    found = one.diff(other, thorough=True, progress=False)
    assert not found.is_same and found.batches == (f"{place} of step 3",)
    code, out, _ = everystep_command("diff", one.directory, other.directory, "--thorough")
    assert code == 1 and f"{place} of step 3 differs, but no result" in out and "reads" not in out


def test_the_command_says_where_runs_part_and_exits_with_1(everystep_command):
    one, other = train(batch_size=6), train(swap(3, 7), batch_size=6)
    code, out, err = everystep_command("diff", "sequential-1", "sequential-2")
    assert (code, err) == (1, "")
    step, rows = first_step_with(3, 7)
    lines = out.splitlines()
    assert lines[0].split() == ["runs", "sequential-1"] and lines[1].split() == ["sequential-2"]
    cells = [
        f"data.x[3, {column}]  {shortest(float(a))} | {shortest(float(b))}"
        for column, (a, b) in enumerate(zip(new_training().x[3], new_training().x[7], strict=True))
    ]
    first = lines.index(f"experiments {cells[0]}")
    assert [line.strip() for line in lines[first + 1 : first + 4]] == cells[1:]
    more = "data.x  and 2 more of 80 numbers, in rows 3, 7 and columns 0, 1, 2, 3; by at most "
    assert lines[first + 6].strip().startswith(more)
    pair = [shortest(run.losses["loss"][step - 1]) for run in (one, other)]
    assert f"losses      differ from step {step} on: {pair[0]} and {pair[1]}" in lines
    where = lines.index(f"operation   #0 of step {step}")
    assert lines[where + 1].strip() == "aten.addmm.default of module 0, forward"
    assert lines[where + 2].startswith("result      addmm: 8 of 48 elements differ, by at most ")
    assert lines[where + 3].strip().startswith(f"[{rows[0][0]}, 0]")
    assert any(line.startswith("input       x: 4 of 24 elements differ") for line in lines)
    known = f"{rows[0][1]} at position {rows[0][0]}; in the data, counted from 0"
    assert f"rows        {known}" in lines
    assert lines[-1] == "the runs differ"
    sentence = diff_sentence(one.diff(other, progress=False))
    where = "the first operation that differs is #0, aten.addmm.default of module 0, forward; cause: "
    assert sentence.startswith(f"The losses first differ at step {step}; {where}")


def test_the_command_says_that_runs_are_the_same_and_exits_with_0(everystep_command):
    one, other = train(), train()
    same = f"Every loss and every common snapshot up to step {STEPS} is identical, bit for bit."
    assert diff_sentence(one.diff(other, progress=False)) == same
    code, out, err = everystep_command("diff", "sequential-1", "sequential-2")
    assert (code, err) == (0, "")
    assert out.endswith("identical, bit for bit; --thorough compares every operation\n")
    assert "identical up to step 30" in out
    train(steps=10)
    assert everystep_command("diff", "sequential-1", "sequential-3")[0] == 1


def test_a_run_that_is_not_there_is_wrong_use(everystep_command):
    train()
    code, out, err = everystep_command("diff", "sequential-1", "sequential-3")
    assert (code, out) == (2, "") and "no run 'sequential-3'; did you mean sequential-1?" in err


def test_json_has_texts_where_numbers_are_not_finite(everystep_command):
    def infinite(made):
        made.y[0, 0] = math.inf

    train()
    train(infinite)
    code, out, _ = everystep_command("diff", "sequential-1", "sequential-2", "--json")
    said = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert code == 1 and said["loss"]["replayed"] == "inf"
    assert said["operation"]["inputs"][0]["values"] == [[float(new_training().y[0, 0]), "inf"]]
