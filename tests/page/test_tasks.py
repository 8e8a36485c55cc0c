import asyncio
import io
import json
import os
import shutil

import httpx
import numpy as np
import pytest
from tests.page.serving import PATIENCE

import everystep
from everystep.page import task_client as tasks_module
from everystep.page.app import application
from everystep.page.child_process import Ended
from everystep.page.task_client import Event, Task, Tasks
from everystep.page.task_process import Voice, do

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    everystep.train_experiment("two-layer", {"steps": 60}, run=directory / HOSTILE, progress=False)
    everystep.train_experiment(
        "two-layer", {"steps": 60, "optimizer.lr": 2e-4}, run=directory / "other", progress=False
    )
    return directory


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


class Here(Tasks):
    """Does tasks at once, in this process."""

    async def begin(self, asked):
        out = io.BytesIO()
        do(json.loads(json.dumps(asked)), Voice(out))
        said = [json.loads(line) for line in out.getvalue().splitlines()]
        id = f"task-{len(self._tasks)}"
        self._tasks[id] = Said([Event(n, each["event"], each["content"]) for n, each in enumerate(said)])
        return id

    def find(self, id):
        return self._tasks.get(id)

    async def close(self):
        pass


class Said(list):
    async def events(self, after, silence):
        yield None
        for event in self:
            yield event


def asked_of(directory, use, tasks_of=Here):
    """Use the application, with other tasks."""

    async def main():
        app = application(directory)
        app.state.tasks = tasks_of()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            try:
                return await asyncio.wait_for(use(client, app.state.tasks), PATIENCE)
            finally:
                await app.state.tasks.close()

    return asyncio.run(main())


async def outcome(client, path, **asked):
    """Run a task; return all its messages, by kind."""
    begun = await client.post(path, json=asked)
    assert begun.status_code == 200, begun.text
    stream = await client.get(f"/api/tasks/{begun.json()['task']}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    found = {}
    for block in stream.text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found[fields["event"]] = json.loads(fields["data"])
    return found


def of(run, what):
    return f"/api/runs/{run.replace('<', '%3C').replace(' ', '%20')}/{what}"


def test_questions_about_a_run(runs):
    async def use(client, _):
        measured = await outcome(client, of("other", "measure"), expression="loss / 2", name="half")
        others = [await outcome(client, of("other", what)) for what in ("first-nonfinite", "verify")]
        return measured, *others

    measured, finite, verified = asked_of(runs, use)
    run = everystep.open(runs / "other")
    assert measured["result"]["values"] == 60 and measured["result"]["name"] == "half"
    assert run.measured("half")[7] == run.losses["loss"][6] / 2
    assert measured["progress"] == {"done": 60, "total": 60, "what": "measuring"}
    assert "of all operations are finite" in finite["result"]["text"]
    assert "replays bit for bit" in verified["result"]["text"]


def test_a_comparison(runs):
    async def use(client, _):
        return await outcome(client, "/api/compare", one=HOSTILE, other="other")

    result = asked_of(runs, use)["result"]
    assert result["sentence"] == (
        "The losses first differ at step 2; the first operation that differs is #12 of step 1, "
        "aten.mul.Tensor, update; cause: GradientDescent: lr 0.0001 | 0.0002."
    )
    assert result["names"] == [HOSTILE, "other"] and not result["is_same"]
    assert result["asked"] == [{"name": "optimizer GradientDescent.lr", "values": ["0.0001", "0.0002"]}]
    assert result["operation"]["causes"] == ["GradientDescent: lr 0.0001 | 0.0002"]
    one, other = result["sides"]
    assert one["operator"] == other["operator"] == "aten.mul.Tensor" and one["number"] == 12
    assert one["mathematics"] == "0.weight.grad * 0.0001"
    named = {(each["role"], each["name"]): each for each in other["tensors"]}
    gradient, product = named["input", "gradient/0.weight"], named["result", "mul"]
    assert gradient["different"] == [] and product["shape"] == [100, 1000]
    (top, bottom), (left, right) = product["window"]
    assert (bottom - top, right - left) == (64, 64)
    whole = everystep.open(runs / "other")[1].operations[12].results["mul"]
    assert product["values"] == whole[top:bottom, left:right].tolist()
    assert all(top <= i < bottom and left <= j < right for i, j in product["different"])
    assert len(product["different"]) > 3000
    pairs = np.array(result["operation"]["results"][0]["values"], np.float32)
    bits = np.abs(pairs).view(np.int32)  # both have one sign: one is twice the other
    assert product["units"] == np.abs(bits[:, 0] - bits[:, 1]).tolist() and gradient["units"] == []


def test_a_fork(runs):
    async def use(client, _):
        asked = {"at": 20, "settings": {"optimizer.lr": "2e-4"}, "steps": 40}
        wrong = {"at": 20, "settings": {"optimizer.name": "SDG"}}
        bodies = asked | {"name": "another"}, asked, wrong
        return [await outcome(client, of(HOSTILE, "fork"), **body) for body in bodies]

    named, unnamed, wrong = asked_of(runs, use)
    assert named["begun"] == {"run": "another"} and named["result"]["status"] == "finished"
    assert unnamed["begun"] == {"run": f"{HOSTILE}-fork-1"}
    run = everystep.open(runs / "another")
    assert len(run) == 40 and run.facts.fork.parent == HOSTILE
    assert run.measured("lr") == {21: 2e-4} and run.verify(progress=False).is_exact
    assert "did you mean SGD" in wrong["error"]["error"] and "begun" not in wrong


def test_a_rerun_needs_a_condition_that_the_page_may_name(runs):
    async def use(client, _):
        bodies = {"precision": "float16"}, {"python": "/bin/true"}
        return [await outcome(client, of("other", "rerun"), **body) for body in bodies]

    wrong, nothing = asked_of(runs, use)
    assert "must be 'float64', 'bfloat16' or None" in wrong["error"]["error"]
    assert "a condition that differs" in nothing["error"]["error"]  # no page names a program to run


def test_tasks_that_are_cancelled(runs):
    async def use(client, tasks):
        asked = {"at": 60, "settings": {}, "steps": 10_000_000, "name": "endless"}
        id = (await client.post(of("other", "fork"), json=asked)).json()["task"]
        said = []
        async for event in tasks.find(id).events():
            said.append(event)
            if event.name == "progress":
                for _ in range(3):  # asked again, it still ends in its own way
                    assert (await client.delete(f"/api/tasks/{id}")).json() == {}
        # A listener that comes late, or again, gets what matters.
        late = [event.name async for event in tasks.find(id).events()]
        again = [event.name async for event in tasks.find(id).events(after=said[-1].number - 1)]
        return said[-1], late, again

    last, late, again = asked_of(runs, use, Tasks)
    assert last.name == "error" and last.content["cancelled"]
    assert "endless has every step" in last.content["error"]
    assert late == ["begun", "progress", "error"] and again == ["error"]
    run = everystep.open(runs / "endless")
    assert run.status == "stopped" and len(run) > 60
    assert run.snapshots[-1] == len(run)


def test_a_task_that_is_cancelled_before_it_has_begun_ends_at_once(runs):
    async def use(client, tasks):
        id = (await client.post(of("other", "verify"), json={})).json()["task"]
        assert (await client.delete(f"/api/tasks/{id}")).json() == {}
        return [event async for event in tasks.find(id).events()]

    [last] = asked_of(runs, use, Tasks)
    assert last.name == "error" and last.content == {"error": "stopped", "cancelled": True}


def test_what_is_asked_is_checked(runs, monkeypatch):
    monkeypatch.setattr(tasks_module, "MOST_AT_ONCE", 0)
    fork, what_if = of("other", "fork"), of("other", "what-if")
    refused = [
        (of("other", "measure"), {}, "expression is missing"),
        (of("other", "measure"), {"expression": "x" * 20_000}, "longer than"),
        (of("other", "measure"), {"expression": "loss", "every": 0}, "every is 0"),
        (of("other", "measure"), {"expression": "loss", "every": True}, "every is True"),
        (of("other", "measure"), {"expression": "loss", "overwrite": "yes"}, "true or false"),
        (of("other", "when"), {"condition": 3}, "condition is missing"),
        (fork, {}, "at is None"),
        (fork, {"at": 10**30}, "write a whole number"),
        (fork, {"at": 1, "settings": {"optimizer.lr": 1}}, "must map paths to strings"),
        (fork, {"at": 1, "settings": {"data.path": "/etc/passwd"}}, "reads no files"),
        (fork, {"at": 1, "settings": {"..data[path]": "/etc/passwd"}}, "reads no files"),
        (fork, {"at": 1, "settings": {"data={": "}"}}, "not a setting"),
        (fork, {"at": 1, "settings": {".": "}"}}, "not a setting"),
        (fork, {"at": 1, "name": "other"}, "already exists"),
        (what_if, {"at": 1, "until": 3}, "rows are None"),
        (what_if, {"at": 1, "until": 3, "rows": []}, "write whole numbers"),
        (what_if, {"at": 1, "until": 3, "rows": [True]}, "write whole numbers"),
        (of("other", "rerun"), {"threads": 0}, "threads is 0"),
        (of("other", "rerun"), {"mkl": 2}, "mkl is missing"),
        (what_if, {"at": 1, "rows": [1]}, "until is None"),
        ("/api/compare", {"one": "other"}, "other is missing"),
    ]
    names = ["..", ".", ".hidden", "a/b", "../x", "/tmp/x", "a\\b", "a\nb", "\ud800", "é" * 150, "C:x"]
    names += ["-rf", "~root"]
    refused += [(fork, {"at": 1, "name": name}, "cannot be a run's name") for name in names]

    async def use(client, _):
        for path, body, message in refused:
            answer = await client.post(path, content=json.dumps(body))
            assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text
        for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
            assert (await client.post(fork, content=body)).status_code == 400
        for path in (of("no-such-run", "verify"), of("..", "verify"), of("%2e%2e%2fother", "verify")):
            assert (await client.post(path)).status_code == 404, path
        for what in ("steps/x", "steps/1/tensor", "steps/1/tensor?id=batch.x&rows=1"):
            assert (await client.get(of("other", what))).status_code == 400, what
        assert (await client.get("/api/tasks/none/events")).status_code == 404
        assert (await client.delete("/api/tasks/none")).status_code == 404
        busy = await client.post(of("other", "verify"))
        assert busy.status_code == 409 and "wait for one to end" in busy.json()["error"]

    asked_of(runs, use, Tasks)
    assert sorted(path.name for path in runs.iterdir()) == sorted([HOSTILE, "other"])


def test_a_process_that_dies_is_an_answer(runs):
    async def use(client, tasks):
        id = await tasks.begin({"task": "verify", "run": str(runs / "other")})
        await tasks.find(id).kill()
        return [event async for event in tasks.find(id).events()]

    (killed,) = asked_of(runs, use, Tasks)
    assert killed.name == "error" and "exit code -9" in killed.content["error"]


@pytest.mark.sweep
def test_a_process_that_has_answered_answers_again(runs, monkeypatch):
    begun, begin = [], tasks_module.Child.begin

    async def counted(module):
        begun.append(await begin(module))
        return begun[-1]

    async def use(client, tasks):
        run = of("other", "when")
        first = await outcome(client, run, condition="loss < 10000")
        again = await outcome(client, run, condition="loss > 10000")
        wrong = await outcome(client, run, condition="lss > 10000")
        after = await outcome(client, run, condition="loss < 10000")
        assert len(begun) == 1
        begun[-1].kill_now()  # while it waits
        await begun[-1].kill()
        return first, again, wrong, after, await outcome(client, run, condition="loss > 10000")

    monkeypatch.setattr(tasks_module.Child, "begin", counted)
    first, again, wrong, after, last = asked_of(runs, use, Tasks)
    assert first["result"] == after["result"] != again["result"] == last["result"]
    assert "did you mean loss" in wrong["error"]["error"]
    assert len(begun) == 2 and not any(each.is_alive for each in begun)


def test_a_process_that_answers_although_it_was_stopped_is_not_used_again():
    class Deaf:
        """It has not heard the interrupt."""

        is_killed = False
        said = [("ready", {}, b""), ("result", {}, b""), ("waiting", {}, b"")]  # noqa: RUF012

        async def ask(self, request):
            pass

        async def hear(self):
            if self.is_killed:
                raise Ended("has ended")
            if len(self.said) == 2:
                await task.stop()
            return self.said.pop(0)

        def interrupt(self):
            pass

        def kill_now(self):
            self.is_killed = True

        async def kill(self):
            self.is_killed = True

    async def follow():
        return await task.follow(), [event.name async for event in task.events()]

    process = Deaf()
    task = Task(process, {})
    assert asyncio.run(follow()) == (None, ["result"])
    assert process.is_killed


def test_a_question_that_is_being_answered_is_not_asked_twice(runs):
    async def use(client, tasks):
        asked = {"task": "verify", "run": str(runs / "other")}
        first, same = await tasks.begin(asked), await tasks.begin(dict(asked))
        other = await tasks.begin(asked | {"run": str(runs / HOSTILE)})
        await tasks.find(first).stop()
        again = await tasks.begin(asked)
        return first, same, other, again

    first, same, other, again = asked_of(runs, use, Tasks)
    assert first == same
    assert len({first, other, again}) == 3


def test_what_nobody_thought_of_is_an_answer():
    out = io.BytesIO()
    assert not do({"task": "no such task"}, Voice(out))  # its process ends
    ready, error = map(json.loads, out.getvalue().splitlines())
    assert ready["event"] == "ready"
    assert error["content"] == {"error": "KeyError: 'no such task'"}


def test_nobody_listens_any_more():
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as out:
        voice = Voice(out)
        voice.progress(1, 10, "measuring")
        voice.progress(2, 10, "measuring")  # too soon
        voice.progress(10, 10, "measuring")
        lines = [json.loads(line) for line in os.read(reading, 4096).splitlines()]
        assert [line["content"]["done"] for line in lines] == [1, 10]
        os.close(reading)
        voice.say("result", {"value": float("nan")})
        voice.say("result", {})


def test_no_more_tasks_run_at_once_than_may_however_quickly_they_are_asked_for(runs):
    async def use(client, tasks):
        conditions = [{"condition": f"norm(gradients['0.bias']) < {n}"} for n in range(8)]
        asked = [client.post(of("other", "when"), json=each) for each in conditions]
        return [answer.status_code for answer in await asyncio.gather(*asked)]

    statuses = asked_of(runs, use, Tasks)
    assert sorted(statuses) == [200] * 3 + [409] * 5
