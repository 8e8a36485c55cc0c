"""Several processes that train together: one run, in which every step of every rank opens again."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.descent import looped
from tests.sealing import seal, seal_files, sql
from tests.training import ranks_loops
from torch import nn

import everystep
from everystep.page.about import about_data
from everystep.page.columns import Columns
from everystep.page.run_index import RunIndex
from everystep.page.table_rows import Wanted, frame_of, rows_of
from everystep.recording.recorded_run import RecordedRun
from everystep.step.collective_calls import shows_reductions

pytestmark = [
    #: Of Python, from 3.12 on: no other thread holds anything here.
    pytest.mark.filterwarnings("ignore:.* use of fork"),
    # A later torch that shows none fails these tests; that one refuses them is tested in test_refused.
    pytest.mark.skipif(
        torch.__version__ < "2.13" and not shows_reductions(), reason="torch 2.9 shows no reductions"
    ),
]

ROOT = Path(__file__).parents[2]
TRAINED = [
    *("plain", "dropout", "buckets", "unused_parameters", "accumulated", "by_hand", "read"),
    *("local_steps", "many_collectives", "uneven", "epochs", "forked", "trained_model", "sparse"),
    "received",
]
#: These are trained in `make sweep` alone.
SWEPT = [
    *("batch_norm", "views_of_buckets", "product", "lists", "trained_step", "stale", "federated"),
    "functional",
]
REFUSED = {
    "other_parts": r"parts is \['network'\] on rank 0, and \['model'\] on rank 1",
    "hook": "has a hook that exchanges gradients",
    "sharded": "0.weight: is a part of a tensor that several processes share",
    "sent": "send and recv pass tensors between two processes",
    "received_part": "a receive (irecv) into buffer taken is still under way between two steps",
    "programs": 'cannot run your step by programs (engine="program") with several processes yet',
    "joined": "is trained within join()",
    "kept": "the ranks do not begin the same recording: keep is",
    "condition": "stop_when: a condition may hold on one process alone",
    "taken": "runs/taken already exists",
    "unshared": "in which rank 0 writes; use a directory that all machines share",
    "indivisible": "batch_size: 5 rows cannot be split equally among 2 processes",
    "last_batch": "drop_last: a batch of 1 rows cannot be split among 2 processes",
    "own_loss": "loss: must be one of torch's, with a reduction",
    "weighted_loss": "loss: weighs classes",
    "wrapped": "model: is a DistributedDataParallel",
    "own_zero_grad": "optimizer: has a custom zero_grad",
    "other_seed": "the ranks do not begin the same recording: seed is '0' on rank 0, and '1' on rank 1",
    "other_model": "the ranks do not begin the same recording: parameter 0.bias is",
    "stopped": "stop_on_nan: a condition may hold on one process alone",
}


def launched(directory, names, processes=2, **environment):
    """Run loops in several processes; return what each rank found, None if it was killed, and stderr.

    The processes are forks of this one: to import torch takes seconds.
    """
    given = {"WORLD_SIZE": str(processes), "STORE": str(directory / "store")} | environment
    fork = multiprocessing.get_context("fork").Process
    started = [
        fork(target=ranks_loops.run_here, args=(names, directory, given | {"RANK": str(rank)}))
        for rank in range(processes)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join()
    errors = "\n".join(file.read_text() for file in sorted(directory.glob("stderr-*")))
    (directory / "store").unlink(missing_ok=True)
    files = [directory / f"digests-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files], errors


@pytest.mark.sweep
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_them(tmp_path, nodes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    how = ["--nnodes", str(nodes), "--nproc-per-node", "2"]
    how += ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "one"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, ranks_loops.__file__, "plain"]
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    started = [subprocess.Popen(command, cwd=tmp_path, env=os.environ | given) for _ in range(nodes)]
    assert [each.wait() for each in started] == [0] * nodes
    run = everystep.open(tmp_path / "runs/plain")
    assert (len(run.ranks), run.verify().is_exact) == (2 * nodes, True)


def train_all(directory, *, is_sweep):
    names = [*TRAINED, *SWEPT] if is_sweep else [*TRAINED]
    names += ["other_row", "other_weight", "shuffled_mean", "shuffled_sum", "command", "nan"]
    (directory / "found.json").write_text(json.dumps(launched(directory, names)))


@pytest.fixture(scope="module")
def trained(made_once, request):
    """The runs, what each rank found, and stderr."""
    directory = made_once("ranks", partial(train_all, is_sweep=request.config.getoption("--sweep")))
    return directory / "runs", *json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize(
    "name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.sweep) for name in SWEPT)]
)
def test_each_rank_trains_as_without_everystep_and_replays_bit_for_bit(trained, name):
    runs, found, errors = trained
    assert None not in found, errors
    for plain, recorded in (each[name] for each in found):
        assert plain == recorded
    run = everystep.open(runs / name)
    verified = run.verify()
    assert verified.is_exact, verified.problems
    for rank in run.ranks:
        step = rank[3]
        assert step.is_exact and step.loss == rank.losses["loss"][2]


def test_the_steps_are_those_of_both_ranks_by_hand(trained):
    runs, _, _ = trained
    run = everystep.open(runs / "plain")
    torch.manual_seed(0)
    model = ranks_loops.mlp()
    rows = zip(*(ranks_loops.batches(rank) for rank in range(2)), strict=True)
    for number, batches in enumerate(rows, start=1):
        steps = [rank[number] for rank in run.ranks]
        grown = []
        for (x, y), step in zip(batches, steps, strict=True):
            model.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            grown.append([p.grad.clone() for p in model.parameters()])
            assert step.loss == pytest.approx(loss.item(), rel=1e-6)
            assert all(map(torch.equal, step.batch, (x, y)))
        with torch.no_grad():
            for parameter, one, two in zip(model.parameters(), *grown, strict=True):
                parameter -= (one / 2 + two / 2) * 0.01
        for step in steps:
            ends = [update.after for update in step.updates.values()]
            torch.testing.assert_close(ends, [*model.parameters()], rtol=1e-5, atol=1e-7)
    operations = [seen.operation for seen in run[3].operations]
    assert [o.phase for o in operations if "all_reduce" in o.operator] == ["backward"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_model_is_trained_as_by_one_process(trained, tmp_path, reduction):
    one = ranks_loops.shuffled(tmp_path / "one", reduction)
    run = everystep.open(trained[0] / f"shuffled_{reduction}")
    assert run.verify().is_exact
    for steps in zip(one, *run.ranks, strict=True):
        alone, *shares = [step.batch["x"] for step in steps]
        assert torch.equal(alone, torch.cat(shares))
        assert [*map(len, shares)] == ([1, 2] if len(alone) == 3 else [5, 5])
        losses = [step.loss for step in steps[1:]]
        if reduction == "mean":
            losses = [loss * len(x) / len(alone) for loss, x in zip(losses, shares, strict=True)]
        assert sum(losses) == pytest.approx(steps[0].loss, rel=1e-5)
    for rank in run.ranks:
        torch.testing.assert_close(rank.parameters(-1), one.parameters(-1), rtol=1e-5, atol=1e-7)
        assert rank.measured("validation_loss") == run.measured("validation_loss")
        assert rank.measured("lr") == run.measured("lr") == pytest.approx(one.measured("lr"))


def test_commands_train_and_resume_an_experiment(trained):
    run = everystep.open(trained[0] / "command")
    assert (len(run), run.verify().is_exact) == (7, True)
    one, two = (rank[6] for rank in run.ranks)
    assert len(one.batch["x"]) == len(two.batch["x"]) == 32
    assert not torch.equal(one.activations["6"] == 0, two.activations["6"] == 0)  # dropout
    assert "by Python; this is rank 0 of 2 (gloo)" in run.report()


def test_the_run_is_one_directory_and_shows_its_ranks(trained):
    runs, _, _ = trained
    run = everystep.open(runs / "plain")
    assert [each.name for each in run.ranks] == ["plain", "plain/ranks/1"]
    assert [each.name for each in run.ranks[1].ranks] == ["plain", "plain/ranks/1"]
    assert [step.loss for step in run[3].ranks] == [rank.losses["loss"][2] for rank in run.ranks]
    assert run[3].ranks[1].ranks[0].loss == run[3].loss
    assert "this is rank 0 of 2 (gloo)" in run.report()
    assert "plain" in [each.name for each in everystep.runs(runs)]
    assert (
        everystep.open(runs / "plain/ranks/1").losses["loss"].to_list() != run.losses["loss"].to_list()
    )


def test_views_show_the_losses_of_all_ranks(trained, tmp_path):
    run = everystep.open(trained[0] / "uneven")
    one, two = (rank.losses["loss"].to_list() for rank in run.ranks)
    assert run.table_frame()["loss (rank 1)"].to_list() == two[: len(one)]
    assert run.table().frame.equals(run.table_frame())
    assert set(run.plot().data["run"]) == {"uneven", "uneven/ranks/1"}
    index = RunIndex(trained[0])
    columns = Columns().of(index.run("uneven"))
    assert frame_of(columns, rows_of(columns, Wanted())).equals(run.table_frame())
    for rank, name in enumerate(["uneven", "uneven rank 1"]):
        shown = index.run(name)
        about = about_data(name, shown, Columns().of(shown), [])
        assert (about["ranks"], about["steps"]) == (["uneven", "uneven rank 1"], len(run.ranks[rank]))
    damaged = RecordedRun(shutil.copytree(trained[0] / "uneven", tmp_path / "damaged"))
    (damaged.directory / "ranks/1/run.sqlite").write_bytes(b"no database" * 100)
    columns = Columns().of(damaged)
    own = frame_of(columns, rows_of(columns, Wanted()))
    assert own.equals(damaged.table_frame()) and own.equals(run.table_frame().drop("loss (rank 1)"))
    (tmp_path / "uneven/ranks").mkdir(parents=True)
    (tmp_path / "uneven/ranks/1").symlink_to(trained[0] / "uneven/ranks/1")
    for place, name in ((RunIndex(tmp_path), "uneven rank 1"), (index, "uneven rank 2")):
        with pytest.raises(everystep.RunError, match=f"no run '{name}'"):
            place.run(name)


def test_commands_take_the_ranks_of_a_run(trained, tmp_path, everystep_command):
    shutil.copytree(trained[0] / "plain", tmp_path / "runs/plain")
    assert everystep_command("verify", "plain")[0] == 0
    assert "all_reduce([" in everystep_command("step", "plain/ranks/1", "3")[1]
    for given in (["losses"], ["step", "3"], ["why", "3", "loss"]):
        named = everystep_command(given[0], "plain/ranks/1", *given[1:])
        assert everystep_command(given[0], "plain", *given[1:], "--rank", "1") == named
    code, _, error = everystep_command("rows", "plain", "3", "--rank", "2")
    assert code and "plain has no rank 2; its ranks are 0 to 1" in error
    assert everystep_command("table", "plain", "--rank", "1")[0] == 0
    assert Path("plain-ranks-1-losses.html").exists()
    assert everystep_command("du", "plain")[1].split()[-1] == "0"  # no files of others
    code, _, error = everystep_command("prune", "plain", "--snapshots", "0")
    assert code and "was trained by 2 processes" in error
    assert everystep_command("rm", "plain", "--force")[0] == 0
    assert not Path("runs/plain").exists()


def test_a_difference_is_found_on_the_rank_that_has_it(trained):
    runs, _, _ = trained
    found = everystep.open(runs / "plain").diff(everystep.open(runs / "other_row"))
    assert found.names == ("plain/ranks/1", "other_row/ranks/1")
    assert (found.operation.step, found.operation.index) == (5, 0)


@pytest.mark.parametrize(
    ("name", "first", "steps"),
    [
        ("plain", (), ()),
        ("other_weight", (3,), (3, 4, 5, 6, 7, 8)),
        ("local_steps", (1,), (1, 2, 3, 5, 6, 7)),
    ],
)
def test_the_steps_after_which_ranks_differ_are_found(trained, name, first, steps):
    run = everystep.open(trained[0] / name)
    assert run.when("ranks differ").steps == first
    assert run.when("ranks differ", "all").steps == steps


def test_a_number_is_followed_to_the_rank_that_sent_it(trained):
    run = everystep.open(trained[0] / "plain")
    exchanged = run.why(3, "gradients['module.0.weight'][0, 0]", depth=3).causes[0]
    assert exchanged.formula == "rank 0 + rank 1" and exchanged.is_equal
    own = [step.gradients["module.0.weight"][0, 0].item() for step in run[3].ranks]
    assert own[0] == own[1] == sum(number.value for number in exchanged.numbers)
    found = everystep.open(trained[0] / "nan").first_nonfinite()
    assert "all_reduce" in found.operation.operation.operator
    assert (found.why.began.number.rank, found.why.began.rows) == (1, (2,))


def test_questions_about_a_step_of_a_rank(trained):
    run = everystep.open(trained[0] / "dropout").ranks[1]
    assert run.why(3, "loss").number.value == pytest.approx(run[3].loss)
    assert len(run.rows(3).loss) == 6
    measured = run.measure("norm(gradients['module.0.weight'])")
    norm = run[5].gradients["module.0.weight"].norm().item()
    assert measured.values[5] == pytest.approx(norm, rel=1e-6)
    assert run.first_nonfinite() is None


@pytest.mark.parametrize("processes", [3, 4])
@pytest.mark.sweep(every=2)
def test_more_ranks_replay_bit_for_bit(tmp_path, processes):
    names = ["buckets", "dropout"]
    found, errors = launched(tmp_path, names, processes)
    assert None not in found, errors
    for name in names:
        assert all(plain == recorded for plain, recorded in (rank[name] for rank in found))
        assert everystep.open(tmp_path / "runs" / name).verify().is_exact


@pytest.mark.parametrize(
    ("name", "kill"),
    [
        ("forked", "1,13"),
        *[("epochs", kill) for kill in ("1,17", "0,5", "0,17", "1,2")],
        ("unused_parameters", "1,5"),
        ("stale", "1,4"),
        *[("shuffled_mean", kill) for kill in ("1,7", "0,13")],
    ],
)
@pytest.mark.sweep(every=5)
def test_a_killed_rank_ends_the_run_and_all_resume_to_the_same_bits(tmp_path, trained, name, kill):
    parent = {"PARENT": str(trained[0] / "epochs")}
    found, errors = launched(tmp_path, [name], KILL=kill, **parent)
    assert None in found
    run = everystep.open(tmp_path / "runs" / name)
    lacks, verified = min(map(len, run.ranks)), run.verify()
    assert lacks == len(run) or "has recorded only" in " ".join(verified.problems)
    assert verified.steps >= lacks
    found, errors = launched(tmp_path, [name], RESUME="1", RECORDED="1", **parent)
    assert None not in found, errors
    assert [each[name][:1] for each in found] == [each[name][:1] for each in trained[1]]
    run = everystep.open(tmp_path / "runs" / name)
    assert run.verify().is_exact
    for rank, whole in zip(run.ranks, everystep.open(trained[0] / name).ranks, strict=True):
        assert rank.losses.equals(whole.losses)
        last = whole.parameters(-1)
        assert all(torch.equal(tensor, last[name]) for name, tensor in rank.parameters(-1).items())


def test_what_a_group_of_one_process_writes_outside_of_steps_is_kept(tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(4, 1)
        model.register_buffer("taken", torch.zeros(4))
        with everystep.record(model=model, run=tmp_path / "one") as recording:
            for number in range(3):
                with recording.step():
                    loss = model(model.taken)
                    with recording.paused():
                        torch.distributed.all_gather([model.taken], torch.full((4,), number + 1.0))
                    recording.log(loss=loss + model.taken.sum())
                torch.distributed.all_gather([model.bias.detach()], torch.full((1,), number + 1.0))
    finally:
        torch.distributed.destroy_process_group()
    run = everystep.open(tmp_path / "one")
    assert run.verify().is_exact and [
        run[3].state[n].sum() for n in ("buffer/taken", "parameter/bias")
    ] == [8, 2]


@pytest.mark.sweep
def test_a_state_that_one_rank_cannot_read_is_none_of_any(tmp_path, trained):
    launched(tmp_path, ["epochs"], RECORDED="1", LEAVE="15", SNAPSHOTS="1")
    place = tmp_path / "runs/epochs"
    newest = max((place / "ranks/1/snapshots").iterdir())
    (newest / "parameters.safetensors").write_bytes(b"altered")
    found, errors = launched(tmp_path, ["epochs"], RESUME="1", RECORDED="1")
    assert [each["epochs"][:1] for each in found] == [each["epochs"][:1] for each in trained[1]], errors
    assert "continues after step 13" in errors and everystep.open(place).verify().is_exact
    for file in place.glob("ranks/1/snapshots/*/parameters.safetensors"):
        file.write_bytes(b"altered")
    found, errors = launched(tmp_path, ["epochs"], RESUME="1", RECORDED="1")
    for each in found:
        assert "no state that all ranks can read: " in each["epochs"], errors
        assert "ranks/1/snapshots/000000/parameters.safetensors was changed" in each["epochs"]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("epochs", [(2, {"LEAVE": "8"}), (3, {"KILL": "2,11"}), (1, {})]),
        ("epochs", [(1, {"LEAVE": "15"}), (4, {})]),
        ("shuffled_mean", [(2, {"LEAVE": "8"}), (1, {"LEAVE": "13"}), (2, {})]),
    ],
)
@pytest.mark.sweep(every=3)
def test_another_number_of_processes_continues_a_run(tmp_path, name, stages):
    resumed = {}
    for processes, given in stages:
        found, errors = launched(tmp_path, [name], processes, RECORDED="1", **resumed, **given)
        resumed = {"RESUME": "1"}
    assert None not in found and found[0] == found[-1], errors
    run = everystep.open(tmp_path / "runs" / name)
    assert f"continues with {processes} after step {run.stretches[-1].first - 1}: its results" in errors
    count = [stretch.facts.processes for stretch in run.stretches]
    assert (count[0], count[-1]) == (stages[0][0], processes)
    for rank in run.ranks:
        assert rank.verify().is_exact
    for stretch in run.stretches:
        step = run[stretch.first]
        assert len(step.ranks) == stretch.facts.processes
        assert all(each.is_exact and each.number == step.number for each in step.ranks)
    if run.ranks[1:]:
        assert run.when("ranks differ").steps == ()
        with pytest.raises(everystep.RunError, match=f"not kept .keep: those by {processes} processes"):
            run.ranks[1][1]
    assert run.doctor().is_healthy
    if name == "shuffled_mean":  # it has the batches of one process
        for steps in (8, 13, 20):
            given = {"epochs": None, "steps": steps, "resume": True}
            one = ranks_loops.shuffled(tmp_path / "one", "mean", **given)
        torch.testing.assert_close(run.parameters(-1), one.parameters(-1), rtol=1e-5, atol=1e-7)
    elif processes == 4:  # a quarter of the second epoch has less than one of its three batches now
        assert len(run) == 15 + 3 + 3


@pytest.mark.sweep
def test_three_ranks_add_gradients_in_the_same_order_when_they_resume(tmp_path):
    wanted, errors = launched(tmp_path, ["epochs"], 3)
    assert None not in wanted and "cannot keep" not in errors and "not among" not in errors, errors
    shutil.move(tmp_path / "runs", tmp_path / "whole")
    given = {"RECORDED": "1", "SNAPSHOTS": "1"}
    launched(tmp_path, ["epochs"], 3, **given, KILL="1,11")
    shutil.copytree(tmp_path / "runs", tmp_path / "killed")
    found, errors = launched(tmp_path, ["epochs"], 3, **given, RESUME="1")
    assert [each["epochs"] for each in found] == [each["epochs"][:1] for each in wanted], errors
    assert "may differ" not in errors
    run = everystep.open(tmp_path / "runs/epochs")
    pairs = zip(run.ranks, everystep.open(tmp_path / "whole/epochs").ranks, strict=True)
    assert all(each.losses.equals(whole.losses) for each, whole in pairs)
    assert (len(run), run.verify().is_exact, run.facts.resumed[-1].changed) == (12, True, ())
    # Other buckets add them in another order.
    shutil.rmtree(tmp_path / "runs")
    shutil.move(tmp_path / "killed", tmp_path / "runs")
    found, errors = launched(tmp_path, ["epochs"], 3, **given, RESUME="1", BUCKET="0.0001")
    assert None not in found and "gradients of 3 processes in another order" in errors
    run = everystep.open(tmp_path / "runs/epochs")
    assert (len(run), run.verify().is_exact) == (12, True)
    assert "another order" in run.facts.resumed[-1].changed[0]


def test_one_rank_removes_what_was_not_begun(tmp_path):
    (tmp_path / "runs/unbegun/ranks/1").mkdir(parents=True)
    found, errors = launched(tmp_path, ["unbegun"], RESUME="1", RECORDED="1")
    assert found[0] == found[1] and everystep.open(tmp_path / "runs/unbegun").verify().is_exact, errors


def test_a_rank_that_cannot_continue_a_run_ends_all(tmp_path):
    model = ranks_loops.mlp()
    with everystep.record(model=model, run=tmp_path / "runs/full") as recording:
        for x, _ in recording.steps(ranks_loops.batches(0)):
            recording.log(loss=model(x).sum())
            if recording.step_count == 3:
                break
    shutil.copytree(tmp_path / "runs/full", tmp_path / "runs/unshared")
    found, errors = launched(tmp_path, ["full", "unshared"], RESUME="1", RECORDED="1")
    assert None not in found, errors
    assert found[0]["full"] == "rank 1 cannot begin the run: there is no room"
    assert found[1]["full"] == "there is no room"
    assert "in which rank 0 writes; use a directory that all machines share" in found[1]["unshared"]
    assert len(everystep.open(tmp_path / "runs/full")) == 4


@pytest.mark.sweep
def test_programs_take_the_steps_of_all_ranks_at_another_rate(trained, tmp_path):
    at, (run, by_loop) = (
        ranks_loops.FORKED_AT,
        (everystep.open(trained[0] / n) for n in ("epochs", "forked")),
    )
    fork = run.ranks[1].fork(at, lr=0.001, run=tmp_path / "fork", progress=False)
    for rank, other, parent in zip(fork.ranks, by_loop.ranks, run.ranks, strict=True):
        assert rank.verify().is_exact
        assert rank.losses.equals(other.losses) and rank.measured("lr") == other.measured("lr")
        last = other.parameters(-1)
        assert all(torch.equal(tensor, last[name]) for name, tensor in rank.parameters(-1).items())
        [case] = parent.what_if(at, lr=0.001).cases
        assert case.losses == tuple(other.losses["loss"][at:])
        [later] = parent.what_if(at + 3, lr=0.001).cases
        assert len(later.losses) == len(case.losses) - 3 and later.differs_from is None
    assert fork.doctor().is_healthy
    with pytest.raises(everystep.RunError, match="a loop cannot continue theirs"):
        everystep.record(run=fork.directory, resume=True, model=nn.Linear(2, 1)).__enter__()


def test_programs_take_steps_up_to_what_python_read_on_another_rank(trained, tmp_path):
    fork = everystep.open(trained[0] / "read").fork(3, lr=0.05, run=tmp_path / "fork", progress=False)
    assert [*map(len, fork.ranks)] == [4, 4] and fork.verify().is_exact
    assert "rank 1: step 5 differs from the recording" in fork.facts.reason


def test_one_process_makes_a_fork_of_a_model(trained, tmp_path):
    run, model = everystep.open(trained[0] / "shuffled_mean"), ranks_loops.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = {"model": model, "loss": nn.MSELoss(), "optimizer": optimizer}
    fork = run.fork(3, **given, steps=5, run=tmp_path / "fork", progress=False)
    torch.testing.assert_close(fork.parameters(5), run.parameters(5), rtol=1e-5, atol=1e-7)
    verified = fork.verify()
    assert (verified.is_exact, verified.steps, len(fork)) == (True, 2, 5)
    assert fork.losses["loss"][:3].equals(run.losses["loss"][:3])
    with pytest.raises(everystep.RunError, match=r"not kept \(keep: those by one process\)"):
        fork[3]


@pytest.mark.sweep
def test_commands_resume_an_experiment_with_another_number_of_processes(trained, tmp_path):
    shutil.copytree(trained[0] / "command", tmp_path / "runs/command")
    assert everystep.open(tmp_path / "runs/command").resume(9, progress=False).verify().is_exact
    for processes in (4, 1):  # the second time, nothing is left to do
        found, errors = launched(tmp_path, ["command_again"], processes, RECORDED="1")
        assert None not in found, errors
    assert "has all its 11 steps" in found[0]["command_again"]
    run = everystep.open(tmp_path / "runs/command")
    assert [each.facts.processes for each in run.stretches][-2:] == [1, 4]
    for rank in run.ranks:
        assert len(rank) == 11 and rank.verify().is_exact
    assert [len(step.batch["x"]) for step in run[11].ranks] == [16] * 4
    assert (
        run.table_frame()["loss (rank 3)"].to_list()
        == [None] * 9 + run.ranks[3].losses["loss"][9:].to_list()
    )


def test_what_is_not_possible_is_refused_on_all_ranks(tmp_path):
    (tmp_path / "runs/taken").mkdir(parents=True)
    found, errors = launched(tmp_path, [*REFUSED, "alone"], RECORDED="1")
    assert None not in found, errors
    for name, message in REFUSED.items():
        for rank in found:
            assert message.replace("\\", "") in rank[name], name
    assert "rank 1 has not begun a recording within" in found[0]["alone"]
    assert not (tmp_path / "runs/unshared").exists()


def test_what_needs_one_process_is_refused(trained):
    runs, _, _ = trained
    run = everystep.open(runs / "plain")
    relabel = {"relabel": {0: 1.0}}
    for ask in (partial(run.fork, 3, **relabel), partial(run.what_if, 3, **relabel), run.rerun):
        with pytest.raises(everystep.RunError, match="was trained by 2 processes"):
            ask()
    with pytest.raises(everystep.RunError, match=r"0\.weight is not the same on ranks 0 and 1"):
        everystep.record(run=runs / "other_weight", resume=True, model=nn.Linear(2, 1)).__enter__()
    with pytest.raises(everystep.RunError, match="fork it with 2 processes"):
        everystep.record(fork=runs / "plain", at=3, model=nn.Linear(2, 1)).__enter__()
    with pytest.raises(everystep.UsageError, match="has no ranks"):
        one = looped(nn.Linear(2, 1), [torch.ones(2)], lambda model, x: model(x).sum(), optimizer=None)
        one.when("ranks differ")


@pytest.mark.parametrize("name", ["plain", "uneven"])
def test_what_is_altered_on_another_rank_is_reported(trained, tmp_path, name):
    copy = shutil.copytree(trained[0] / name, tmp_path / name)
    last = 7 if name == "uneven" else 8  # rank 0 of the former has five steps
    sql(copy / "ranks/1", f"UPDATE steps SET loss = loss + 1 WHERE step = {last}")
    seal(copy / "ranks/1")
    assert not everystep.open(copy).verify().is_exact


def test_a_missing_state_of_another_rank_is_reported(trained, tmp_path):
    copy = shutil.copytree(trained[0] / "plain", tmp_path / "plain")
    newest = max((copy / "ranks/1/snapshots").iterdir())
    shutil.rmtree(newest)
    run = everystep.open(copy)
    assert not run.verify().is_exact
    [found] = run.doctor().findings
    assert found.place == f"ranks/1/snapshots/{newest.name}"


def test_ranks_of_one_run_differ(trained):
    one, two = everystep.open(trained[0] / "plain").ranks
    assert not one.diff(two).is_same


def test_a_run_without_one_of_its_ranks_does_not_replay(trained, tmp_path):
    shutil.copytree(trained[0] / "plain", tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain/ranks/1")
    run = everystep.open(tmp_path / "plain")
    assert len(run.losses) == ranks_loops.STEPS
    shown = RunIndex(tmp_path).run("plain")
    assert about_data("plain", shown, Columns().of(shown), [])["snapshots"][0] == 0
    with pytest.raises(everystep.RunError, match="the run of one of them is missing"):
        run[3]
    (tmp_path / "plain/ranks/1").symlink_to(trained[0] / "plain/ranks/1")
    with pytest.raises(everystep.RunError, match="the run of one of them is missing"):
        everystep.open(tmp_path / "plain")[3]
    shutil.copytree(trained[0] / "plain/ranks/1", tmp_path / "alone")
    with pytest.raises(
        everystep.RunError, match="alone is rank 1 of a run, and is not in its directory"
    ):
        everystep.open(tmp_path / "alone")[3]


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('"sum"', '"sort"', "different collectives"),
        ("[0, 1]]", "[1, 7]]", "waits in all_reduce_ for other ranks"),
        ("[0, 1]]", "[0]]", "rank 1 takes part in"),
        ("[0, 1]]", "[1, 1]]", "waits in all_reduce_ for other ranks"),
        ('"everystep.all_reduce_.default"', '"everystep.broadcast_.default"', "not a valid program"),
    ],
)
def test_collectives_that_do_not_fit_are_refused(trained, tmp_path, was, now, message):
    """A stranger may have written the programs of a rank."""
    copy = shutil.copytree(trained[0] / "plain", tmp_path / "plain")
    for file in (copy / "ranks/1/programs").glob("*.json"):
        file.write_text(file.read_text().replace(was, now))
    seal_files(copy / "ranks/1")
    with pytest.raises(everystep.RunError, match=message):
        everystep.open(copy)[3]


def test_a_collective_reads_no_memory_beyond_its_tensors(trained, tmp_path):
    copy = shutil.copytree(trained[0] / "plain", tmp_path / "plain")
    for rank in (copy, copy / "ranks/1"):
        for file in (rank / "programs").glob("*.json"):
            program = json.loads(file.read_text())
            [exchanged] = [o for o in program["operations"] if "all_reduce" in o["operator"]]
            program["tensors"][exchanged["arguments"][0][0]] |= {"shape": [10**6], "stride": [0]}
            file.write_text(json.dumps(program))
        seal_files(rank)
    with pytest.raises(everystep.RunError, match="its tensors do not fit together"):
        everystep.open(copy)[3]
