"""A rerun: the losses of the loop by hand under the same conditions, and the operation that parts."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.descent import descend, looped, trained
from torch import nn

import everystep
from everystep.answers.other_process import Conditions
from everystep.errors import ExperimentError, RunError, TrainingError, UsageError
from everystep.views.comparisons import rerun_sentence

STEPS = 14
#: The chapter's loop, with nothing of everystep; prints its losses as hexadecimal numbers.
BY_HAND = """
import sys, torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
x, y = torch.randn(64, 1000), torch.randn(64, 10)
model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
for step in range(int(sys.argv[1])):
    loss = nn.functional.mse_loss(model(x), y, reduction="sum")
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter - parameter.grad * 1e-4)
    print(loss.item().hex())
"""


@pytest.fixture(scope="module")
def chapter_run(tmp_path_factory):
    torch.manual_seed(0)
    x, y = torch.randn(64, 1000), torch.randn(64, 10)
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer, loss = everystep.GradientDescent(model.parameters(), lr=1e-4), nn.MSELoss(reduction="sum")
    place = tmp_path_factory.mktemp("rerun") / "chapter"
    return trained(model, (x, y), loss=loss, optimizer=optimizer, steps=STEPS, run=place)


@pytest.fixture(scope="module")
def compatible(chapter_run):
    return chapter_run.rerun(mkl="COMPATIBLE", progress=False)


def by_hand(**environment):
    command = [sys.executable, "-c", BY_HAND, str(STEPS)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [float.fromhex(line) for line in done.stdout.split()]


@pytest.mark.sweep
def test_other_numerics_give_the_losses_of_the_loop_by_hand_there(chapter_run, compatible):
    assert compatible.losses.tolist() == by_hand(MKL_CBWR="COMPATIBLE")
    assert compatible.recorded.tolist() == chapter_run.losses["loss"].to_list()


def test_it_names_the_first_operation_with_other_bits(compatible):
    assert not compatible.has_same_bits
    assert compatible.changed["mkl_cbwr"][1] == "COMPATIBLE"
    # The first matrix product of the first step rounds differently.
    assert compatible.diverges_at == 1
    assert compatible.operation.index == 0
    assert compatible.operation.one.operation.operator == "aten.addmm.default"
    assert not compatible.operation.inputs
    text = compatible.to_text()
    assert "first difference: operation #0 of step 1, aten.addmm.default of module 0, forward" in text
    assert text.endswith("chapter differs from step 1 on")
    assert json.loads(json.dumps(compatible.data()))["diverges_at"] == 1


@pytest.mark.sweep
def test_the_same_numerics_give_the_same_bits(chapter_run, everystep_command):
    capability = chapter_run.facts.training.numerics.cpu_capability.lower().replace("no avx", "default")
    arguments = ["--capability", capability, "-o", "both.png"]
    code, out, err = everystep_command("rerun", chapter_run.directory, *arguments)
    assert code == 0
    assert f"all {STEPS} bit-identical" in out
    assert out.endswith("chapter is bit-identical under these conditions\n")
    assert "both.png" in err


def test_dropout_in_double_precision_draws_the_masks_of_the_recording(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = trained(model, (x, y), optimizer=optimizer, steps=STEPS, run=tmp_path / "dropout")
    found = run.rerun(precision="float64", progress=False)
    # Other masks would be another loss altogether.
    assert 0 < found.relative.max() < 1e-5


def loop(optimizer, x, y, model, log=lambda loss: None, batches=iter):
    """A loop as its author wrote it."""
    losses = []
    for rows in batches([slice(0, 12), slice(8, 20)] * 5):
        loss = descend(optimizer, nn.functional.mse_loss(model(x[rows]), y[rows]))
        log(loss)
        losses.append(loss.item())
    return losses


def recorded(optimizer, x, y, model, place):
    """Record the loop; return the run."""
    with everystep.record(model=model, optimizer=optimizer, run=place) as recording:
        loop(optimizer, x, y, model, lambda loss: recording.log(loss=loss), recording.steps)
    return recording.run


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("AdamW", {"fused": True}), ("NAdam", {"foreach": False})),
        *(("NAdam", {"foreach": True}), ("AdamW", {"foreach": False})),  # which reads its counter
        *(("Adam", {"lr": torch.tensor(0.01)}), ("Adafactor", {})),
        *(("ASGD", {"foreach": False, "t0": 3}), ("ASGD", {"foreach": True, "t0": 3})),
    ],
)
def test_a_recorded_loop_is_taken_in_another_precision(small, tmp_path, name, options):
    """What an optimizer counts with, and its rate, keep their dtype."""
    model, x, y = small

    def optimizer():
        return getattr(torch.optim, name)(model.parameters(), **{"lr": 0.01} | options)

    start = {name: value.double() for name, value in model.state_dict().items()}
    run = recorded(optimizer(), x, y, model, tmp_path / "loop")
    found = run.rerun(precision="float64", progress=False)
    model.double().load_state_dict(start)
    assert found.losses.tolist() == loop(optimizer(), x.double(), y.double(), model)
    if name == "AdamW":
        assert 0 < found.relative.max() < 1e-5 and found.beyond is None
        assert (found.compared[0], found.compared[-1]) == (1, len(found.losses))
    found = run.rerun(precision="bfloat16", progress=False)
    model.bfloat16().load_state_dict(start)
    assert found.losses.tolist() == loop(optimizer(), x.bfloat16(), y.bfloat16(), model)


class OwnAdamW(torch.optim.AdamW):
    """Watched operation by operation, as every optimizer that is not exactly torch's."""


def test_a_fused_optimizer_of_a_user_counts_beyond_what_bfloat16_counts(small, tmp_path):
    """bfloat16 counts to 256; the steps that an optimizer has taken keep their dtype, by their name."""
    model, x, y = small
    optimizer = OwnAdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(30):
        loop(optimizer, x, y, model)
    start, kept = deepcopy((model.state_dict(), optimizer.state_dict()))
    run = recorded(optimizer, x, y, model, tmp_path / "loop")
    found = run.rerun(precision="bfloat16", progress=False)
    model.bfloat16().load_state_dict(start)
    optimizer = OwnAdamW(model.parameters(), fused=True)
    optimizer.load_state_dict(kept)
    assert found.losses.tolist() == loop(optimizer, x.bfloat16(), y.bfloat16(), model)


def test_weights_that_are_not_laid_row_after_row_go_elsewhere(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    x, y = torch.randn(20, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(20, 1)
    run = recorded(optimizer, x, y, network, tmp_path / "loop")
    assert 0 < run.rerun(precision="float64", progress=False).relative.max() < 1e-5


def test_what_no_replay_has_is_not_blamed_on_the_place(small, tmp_path):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logged, array = [], model[0].weight.detach().numpy()

    def log(loss):
        recording.log(loss=loss)
        logged.append(loss)
        if len(logged) == 3:
            array[1, 2] += 0.5

    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "loop") as recording:
        loop(optimizer, x, y, model, log, recording.steps)
    found = recording.run.rerun(precision="float64", progress=False)
    note = "a replay under the recorded conditions also differs from the recording, from step 4 on"
    assert any(problem.startswith(note) for problem in found.problems)
    # Another question, after steps were opened, knows of it, too.
    opened = everystep.open(tmp_path / "loop")
    assert opened[6].diverged_at == 4 and opened.problems
    assert any("from step 4 on" in each for each in opened.diff(opened, thorough=True).problems)


def test_what_code_carries_from_step_to_step_is_taken_from_the_recording(tmp_path):
    torch.manual_seed(0)
    means = [torch.zeros(1)]

    def loss_of(model, x):
        out = model(x)
        means.append(0.9 * means[-1] + 0.1 * out.detach().mean(0))
        return (out - means[-2] - 1).square().mean()

    run = looped(nn.Linear(3, 1), torch.randn(4, 5, 3), loss_of, run=tmp_path / "loop")
    found = run.rerun(precision="float64", progress=False)
    (note,) = found.problems
    assert "a tensor that is in no part and no batch (input), which your code may compute" in note


def test_a_step_function_of_rounding_is_found_beyond_rounding(chapter_run):
    found = chapter_run.rerun(precision="bfloat16", progress=False)
    # A ReLU with an input near 0 is on in one precision, and off in the other.
    assert found.beyond.operator == "aten.threshold_backward.default"
    assert found.beyond.relative > found.rounding == 0.05


def test_of_two_runs_it_says_which_is_nearer(chapter_run, compatible):
    nearer = chapter_run.rerun(precision="float64", compare=[chapter_run], progress=False)
    distance = nearer.data()["distance"]["chapter"]
    relative = abs(nearer.recorded - nearer.losses) / nearer.losses
    assert distance == {"median": np.median(relative), "largest": relative.max()}
    assert set(compatible.curves) == {"chapter", "chapter, rerun"}


def test_a_fork_is_taken_from_where_it_begins(chapter_run):
    fork = chapter_run.fork(10, lr=2e-4, steps=14, run=chapter_run.directory.parent / "fork",
                            progress=False)  # fmt: skip
    found = fork.rerun(precision="float64", progress=False)
    assert found.first == 11
    assert len(found.losses) == 4
    assert found.relative.max() < 1e-5


def test_what_cannot_be_taken_elsewhere_is_refused_with_the_reason(chapter_run):
    with pytest.raises(UsageError, match="needs a condition that differs"):
        chapter_run.rerun(progress=False)
    with pytest.raises(ExperimentError) as error:
        chapter_run.rerun(threads=9999, capability="x", mkl="y", python="/nowhere", progress=False)
    for part in ("threads: must", "capability: must", "mkl: must", "/nowhere is not a program"):
        assert part in str(error.value)


def test_noise_is_other_noise_in_another_precision_and_an_order_of_rows_the_same(tmp_path):
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(x + x[torch.randperm(len(x))])

    x, y = torch.randn(8, 4), torch.randn(8, 1)
    mixed = trained(Mixed(4, 1), (x, y), steps=3, run=tmp_path / "mixed")
    assert 0 < mixed.rerun(precision="float64", progress=False).relative.max() < 1e-5
    run = trained(Noisy(4, 1), (x, y), steps=3, run=tmp_path / "noisy")
    with pytest.raises(RunError, match="draws different random numbers in float64"):
        run.rerun(precision="float64", progress=False)


def test_an_interpreter_without_everystep_is_told_how_to_get_it(chapter_run, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(TrainingError, match="-m pip install everystep=="):
        chapter_run.rerun(python=str(bare), progress=False)


def test_a_sentence_says_where_a_run_parts_and_by_how_much(compatible):
    losses = compatible.recorded.copy()
    losses[6] *= 1.25
    found = rerun_sentence(replace(compatible, losses=losses, diverges_at=2))
    assert found.startswith("chapter differs from step 2 on; farthest apart at step 7: ")
    assert found.endswith(", 0.25 of the recorded loss")
    double = replace(compatible, losses=losses, place=Conditions(precision="float64"))
    assert rerun_sentence(double).startswith("the losses in float64 are within 0.25 of those of chapter")
    same = replace(compatible, losses=compatible.recorded, diverges_at=None)
    assert rerun_sentence(same) == "chapter is bit-identical under these conditions"


def test_a_gradient_that_is_zero_but_for_rounding_does_not_count(tmp_path, everystep_command):
    """Batch norm takes away what the bias of a convolution before it adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.randn(48, 3, 8, 8), torch.randint(0, 3, (48,))
    options = {"loss": nn.CrossEntropyLoss(), "optimizer": optimizer, "batch_size": 16}
    trained(model, data, steps=6, run=tmp_path / "normalized", **options)
    code, out, _ = everystep_command("rerun", "normalized", "--precision", "float64")
    assert code == 0
    assert "all results are within 0.0001 of their largest number" in out
    assert "results that are zero except for rounding do not count; the first:" in out
    assert "aten.convolution_backward.default of module 0, backward" in out
    assert "its terms cancel, and only rounding errors remain: at most " in out
    code, out, _ = everystep_command("rerun", "normalized", "--precision", "float64", "--json")
    found = json.loads(out)
    assert found["beyond"] is None
    residue = found["residue"]["residue"]
    assert residue["argument"] is None and residue["there"] < 1e-12 < residue["own"] < 1e-6
    assert all(each["relative"] < 1e-4 for each in found["farthest"])


def test_rounding_that_adam_divides_by_its_own_size_is_named(everystep_command):
    """The first step of Adam is as long for a gradient of rounding alone as for any other."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)  # the bias of its keys changes nothing
    batches = [torch.randn(4, 6, 8) for _ in range(2)]

    def loss_of(model, x):
        return model(x, x, x, need_weights=False)[0].pow(2).mean()

    looped(model, batches, loss_of, run="./attention", optimizer=partial(torch.optim.AdamW, lr=3e-3))
    _, out, _ = everystep_command("rerun", "attention", "--precision", "float64")
    assert "aten.addcdiv_.default, update" in out
    assert "numbers of its input tensor1 are zero except for rounding (at most " in out
    assert "as the first step of Adam does" in out


def test_data_that_a_run_does_not_hold_is_used_by_reruns_and_matches(monkeypatch):
    monkeypatch.setattr("everystep.recording.files.DATA_LIMIT", 10)
    torch.manual_seed(0)
    model, runs = nn.Linear(10, 1), []
    rows = torch.randn(8, 10).bfloat16(), torch.randn(8, 1).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        data = tuple(each.to(dtype) for each in rows)
        run = trained(model.to(dtype), data, steps=1)
        assert not run.facts.training.data_file.stored
        runs.append(everystep.open(run.directory, data=data))
    assert runs[1].rerun(mkl="COMPATIBLE", progress=False).losses.tolist()
    assert runs[1].match(runs[0], 1).precisions == ("float32", "bfloat16")
