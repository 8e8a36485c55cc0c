import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.page.serving import PATIENCE
from tests.sealing import seal_files

import everystep
from everystep.errors import RunError
from everystep.page import worker
from everystep.page.child_process import limit_memory
from everystep.page.worker import KEPT_RUNS, Interruption, Openers, answers
from everystep.page.worker_client import Gone, NoAnswer, WorkerClient
from everystep.program.soundness import note_sound

HOSTILE = "<img src=x onerror=alert(1)> '\"&\N{SNOWMAN}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("worker") / "runs"
    everystep.train_experiment("two-layer", {"steps": 20}, run=directory / HOSTILE, progress=False)
    return directory


@pytest.fixture(scope="module")
def trained(directory):
    return directory / HOSTILE


def answered(*requests, openers=None):
    lines = iter([json.dumps(each).encode() if isinstance(each, dict) else each for each in requests])
    said = [*answers(openers or Openers(), lines)]
    assert all(event == "answer" for event, _, _ in said)
    return [(content["status"], content["about"], data) for _, content, data in said]


def test_the_numbers_are_those_of_the_step(trained):
    run = everystep.open(trained)
    asked = {"run": str(trained), "step": 7}
    region = {"id": "gradients/0.weight", "index": 0, "count": 1, "rows": None, "columns": [3, 50]}
    region["most"] = 512
    content, numbers, histogram = answered(
        asked | {"kind": "content"},
        asked | region | {"kind": "numbers"},
        asked | {"kind": "histogram", "id": "batch.x"},
    )
    assert content[0] == 200
    assert json.loads(content[2]) == json.loads(json.dumps(run[7].data()))
    assert numbers[1]["columns"] == [3, 50] and numbers[1]["format"] == "float32"
    found = torch.from_numpy(np.frombuffer(numbers[2], "<f4").reshape(100, 47).copy())
    assert found.equal(run[7].gradients["0.weight"][:, 3:50])
    assert sum(json.loads(histogram[2])["counts"]) == 64_000


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"kind": "content", "step": 21}, 404, "it has steps 1 to 20"),
        ({"kind": "content", "step": 0}, 404, "no step 0"),
        ({"kind": "content", "step": 10**30}, 404, "no step 1000"),
        ({"kind": "histogram", "step": 1, "id": "../../etc/passwd"}, 400, "has no tensor"),
        ({"kind": "report", "steps": [*range(1, 22)]}, 404, "no step 21"),
        ({"kind": "content", "step": 1, "run": "nowhere"}, 404, "nowhere"),
        ({"kind": "eval"}, 500, "eval"),
        (b"no json", 500, "cannot be shown"),
        (b"[]", 500, "cannot be shown"),
    ],
)
def test_errors_are_answers(trained, request_, status, message):
    if isinstance(request_, dict):
        request_ = {"run": str(trained)} | request_
    fine = {"kind": "content", "run": str(trained), "step": 1}
    first, second = answered(request_, fine)
    assert first[0] == status and message in first[1]["error"] and first[2] == b""
    assert "Traceback" not in first[1]["error"]
    assert second[0] == 200


def test_runs_are_kept_open_and_made_anew(trained, tmp_path):
    openers = Openers()
    copies = [tmp_path / f"run-{n}" for n in range(KEPT_RUNS + 1)]
    for copy in copies:
        shutil.copytree(trained, copy)
    first = openers.run(str(copies[0]))
    assert openers.run(str(copies[0])) is first
    for copy in copies[1:]:
        openers.run(str(copy))
    assert openers.run(str(copies[0])) is not first  # the one that was asked for longest ago
    known = openers.run(str(copies[0]))
    shutil.rmtree(copies[0])
    with pytest.raises(RunError, match="no longer exists"):
        openers.run(str(copies[0]))
    everystep.train_experiment("two-layer", {"steps": 2}, run=copies[0], progress=False)
    assert openers.run(str(copies[0])) is not known
    assert answered({"kind": "content", "run": str(copies[0]), "step": 3}, openers=openers)[0][0] == 404


def test_a_run_that_is_deleted_while_it_is_read_is_not_there_any_more(trained, tmp_path, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "run")

    def deleted(step, run, asked):
        shutil.rmtree(copy)
        (copy / "programs" / "1.json").read_text()

    monkeypatch.setitem(worker._KINDS, "content", deleted)
    [(status, about, _)] = answered({"kind": "content", "run": str(copy), "step": 3})
    assert (status, about) == (404, {"error": "the run run no longer exists"})


def at_desk(directory, use):
    """Use a desk, in its own event loop."""

    async def main():
        desk = WorkerClient(directory)
        await desk.start()
        try:
            return await asyncio.wait_for(use(desk), PATIENCE)
        finally:
            await desk.close()

    return asyncio.run(main())


async def at_once():
    """Go."""


async def soon():
    """Go in a moment."""
    await asyncio.sleep(0.05)


@pytest.mark.sweep
def test_a_worker_at_work(directory, trained, tmp_path, monkeypatch):
    # The directory that the server is started in may be a stranger's.
    for name in ("json", "torch", "everystep"):
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(42)")
    monkeypatch.chdir(tmp_path)
    endless, long = (shutil.copytree(trained, directory / name) for name in ("endless", "long"))
    slow(endless)
    slow(long, 600)

    async def use(desk):
        first = await desk.ask("content", trained, step=3)
        assert first.status == 200 and json.loads(first.content)["run"] == HOSTILE
        with pytest.raises(Gone):
            await desk.ask("content", trained, step=3, gone=at_once)
        worker = desk._process
        worker.interrupt()  # it takes no notice
        assert await desk.ask("content", trained, step=3) == first
        # An answer that no request waits for is stopped, and the worker continues.
        await desk.ask("report", trained, steps=[1])  # what a report needs is imported
        with pytest.raises(Gone):
            await desk.ask("report", long, steps=list(range(1, 20)), gone=soon)
        assert await desk.ask("content", trained, step=3) == first
        assert desk._process is worker
        # A request that waits when it is killed gets an error; the next one does not notice.
        asked = asyncio.create_task(desk.ask("content", endless, step=3))
        await asyncio.sleep(0.05)
        worker.kill_now()
        with pytest.raises(NoAnswer, match="exit code -9"):
            await asked
        assert await desk.ask("content", trained, step=3) == first
        assert desk._process is not worker
        # The answer to a cancelled request must not be taken for the next one's.
        asked = asyncio.create_task(desk.ask("content", endless, step=3))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.wait([asked])
        assert not (desk._process and desk._process.is_alive)
        # What takes too long is given up, and others continue.
        assert await desk.ask("content", trained, step=3) == first
        with monkeypatch.context() as patch:
            for name in ("_LONGEST", "_LEAVING_PATIENCE"):
                patch.setattr(everystep.page.worker_client, name, 0.1)
            with pytest.raises(NoAnswer, match="minutes and was stopped"):
                await desk.ask("content", endless, step=3)
        assert await desk.ask("content", trained, step=3) == first
        # Nothing outside is opened, and nothing once it is stopped.
        for place in (tmp_path, directory, directory / ".." / "runs" / ".." / "other"):
            with pytest.raises(RunError, match="is not in"):
                await desk.ask("content", place, step=1)
        await desk.close()
        with pytest.raises(NoAnswer, match="being stopped"):
            await desk.ask("content", trained, step=1)

    at_desk(directory, use)
    shutil.rmtree(endless)
    shutil.rmtree(long)


def test_an_interrupt_during_an_import_ends_the_worker(tmp_path, monkeypatch):
    # A module that is interrupted there cannot be imported again: torch's compiler, for one.
    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    try:
        interruption = Interruption()
        with pytest.raises(SystemExit, match="130"), interruption:
            import interrupted  # noqa: F401
        with pytest.raises(KeyboardInterrupt), interruption:
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # between two requests nothing happens
    finally:
        signal.signal(signal.SIGINT, before)


def slow(run, size=10_000):
    """Let a run's steps compute for long; a product of the largest matrices cannot be interrupted."""
    for path in (run / "programs").iterdir():
        data = json.loads(path.read_text())
        data["storages"]["large"] = {"kind": "temporary", "bytes": 4 * size**2}
        data["tensors"]["large"] = {"dtype": "float32", "shape": [size, size]}
        more = {"phase": "forward", "results": ["large"]}
        fill = more | {"operator": "aten.ones.default", "arguments": [[size, size]]}
        multiply = more | {"operator": "aten.mm.default", "arguments": ["large", "large"]}
        data["operations"] += [fill, *[multiply] * 300]
        text = json.dumps(data).encode()
        path.write_bytes(text)
        note_sound(text)  # to check it would import the compiler, and a worker that is importing ends
    seal_files(run)


def take_memory(run, given):
    """Answer requests for more memory than a process may have, and for some."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # those that are counted
    limit_memory(pages * os.sysconf("SC_PAGE_SIZE") + 1_500_000_000)
    for size in (2**40, 10, 2**31):
        worker._KINDS["content"] = lambda *_, n=size: ({}, torch.zeros(n).numpy().tobytes()[:1])
        given.send(answered({"kind": "content", "run": str(run), "step": 1})[0][:2])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
@pytest.mark.filterwarnings("ignore:.* use of fork")
def test_what_takes_too_much_memory_is_refused_and_the_worker_goes_on(trained):
    taken, given = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=take_memory, args=(trained, given))
    process.start()
    given.close()
    first, second, third = (taken.recv() for _ in range(3))
    process.join()
    assert "more memory than a process of the page may use" in first[1]["error"]
    assert (first[0], second[0], third[0]) == (500, 200, 500)


def test_what_is_given_up_leaves_no_run_half_replayed(trained, monkeypatch):
    openers = Openers()
    first = answered({"kind": "content", "run": str(trained), "step": 3}, openers=openers)
    known = openers.run(str(trained))

    def given_up(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Openers, "step", given_up)
        [(status, about, _)] = answered(
            {"kind": "content", "run": str(trained), "step": 9}, openers=openers
        )
    assert (status, about) == (499, {"error": "given up"})
    assert openers.run(str(trained)) is not known
    assert answered({"kind": "content", "run": str(trained), "step": 3}, openers=openers) == first
