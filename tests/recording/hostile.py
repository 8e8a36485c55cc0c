"""Runs as a stranger might send them: each is altered in one way, on purpose."""

import json
import os
import shutil

import torch
from tests import sealing
from tests.sealing import seal_files

from everystep.program.step_program import MOST_ENTRIES
from everystep.recording.contents import packed, unpacked
from everystep.recording.files import _digest

REST = "snapshots/000000/rest.safetensors"
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066"


def sql(*statements):
    """Return what changes the database of a run; a statement is a text, or has arguments."""

    return lambda run: sealing.sql(run, *statements)


def numbers(number):
    """Return what makes all numbers of all steps but the first ones the same one."""

    def change(run):
        for step, known in sealing.sql(run, "SELECT step, numbers FROM repeats WHERE step > 2"):
            forged = [number] * len(unpacked(known, "a step") or [])
            sealing.sql(run, ("UPDATE repeats SET numbers = ? WHERE step = ?", (packed(forged), step)))
        sealing.seal_repeats(run)

    return change


def other_program(run):
    """Let a program that cannot be there repeat each step."""
    sealing.sql(run, "UPDATE repeats SET program = -1")
    sealing.seal_repeats(run)


def fact(key, value):
    """Return what sets a fact: a value of JSON."""
    return sql(("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value))))


def within(key, *path, value):
    """Return what changes a value within a fact."""

    def change(run):
        [(text,)] = sealing.sql(run, ("SELECT value FROM facts WHERE key = ?", (key,)))
        place = whole = json.loads(text)
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        sealing.sql(run, ("UPDATE facts SET value = ? WHERE key = ?", (json.dumps(whole), key)))

    return change


def many(table, rows):
    """Return what adds rows to a table."""
    places = ", ".join("?" * len(rows[0]))
    return sql((f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows))


def states(steps):
    """Return rows of files of states."""
    files = "parameters.safetensors", "rest.safetensors"
    return [(f"snapshots/{step:06d}/{file}", 1, b"") for step in steps for file in files]


def linked(name):
    """Return what makes a file or a directory of a run a link to one outside of it."""

    def change(run):
        outside = run.parent.parent / "outside" / run.name
        outside.mkdir(parents=True, exist_ok=True)
        target = outside / name.replace("/", "-")
        if (run / name).exists():
            shutil.move(run / name, target)
        else:
            target.write_text("precious")
        (run / name).symlink_to(target)

    return change


def pipe_for_a_lock(run):
    """Put a pipe in place of the lock: to open it for reading never ends."""
    (run / "run.lock").unlink(missing_ok=True)
    os.mkfifo(run / "run.lock")


def hard_linked(run):
    """Give the database a second name outside of the run."""
    outside = run.parent.parent / "outside" / run.name
    outside.mkdir(parents=True)
    os.link(run / "run.sqlite", outside / "run.sqlite")


def program(change_data):
    """Return what changes the first program."""

    def change(run):
        path = run / "programs" / "1.json"
        data = json.loads(path.read_text())
        change_data(data)
        path.write_text(json.dumps(data))
        seal_files(run)

    return change


def program_text(text):
    """Return what replaces the first program, with the digest to match."""

    return lambda run: ((run / "programs" / "1.json").write_text(text), seal_files(run))


def tensors(name, change_tensors):
    """Return what changes the tensors of a file, with the digests to match."""

    def change(run):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(run / name, "pt") as file:
            about = file.metadata()
        found = load_file(run / name)
        change_tensors(found)
        save_file(found, run / name, about)
        size = sum(tensor.nbytes for tensor in found.values())
        fact = json.dumps(
            {"file": name, "stored": True, "bytes": size, "digest": _digest(found), "strides": {}}
        )
        if name == "data.safetensors":
            sql(("UPDATE facts SET value = ? WHERE key = 'data_file'", (fact,)))(run)
        seal_files(run)

    return change


def metadata(text):
    """Return a change of a state's contents other than tensors, with a matching digest."""

    def change(run):
        from safetensors.torch import load_file, save_file

        path = run / "snapshots" / "000000" / "rest.safetensors"
        save_file(load_file(path), path, {"everystep": text})
        seal_files(run)

    return change


def _many_operations(data):
    data["operations"] = [min(data["operations"], key=lambda each: len(str(each)))] * (MOST_ENTRIES + 1)


HOSTILE = {
    "text for a loss": sql("UPDATE steps SET loss = 'low' WHERE step = 2"),
    "blob for a loss": sql("UPDATE steps SET loss = x'00ff' WHERE step = 5"),
    "huge step": sql("INSERT INTO steps VALUES (9223372036854775807, 1.0)"),
    "negative step": sql("INSERT INTO steps VALUES (-9223372036854775808, 1.0)"),
    "text for a value": sql("INSERT INTO measurements VALUES ('a', 1, 'low')"),
    "blob for a name": sql("INSERT INTO measurements VALUES (x'00ff', 1, 1.0)"),
    "text for a step": sql("INSERT INTO measurements VALUES ('a', 'first', 1.0)"),
    "huge step of a value": sql("INSERT INTO measurements VALUES ('a', 9223372036854775807, 1.0)"),
    "negative step of a value": sql("INSERT INTO measurements VALUES ('a', -9223372036854775808, 1.0)"),
    "long name": many("measurements", [("n" * 1_000_000, 1, 1.0)]),
    "many names": many("measurements", [(f"name {n}", 1, 1.0) for n in range(20_000)]),
    "steering name": many("measurements", [(STEERING, 1, 1.0)]),
    "text for a size": sql("UPDATE files SET size = 'many'"),
    "blob for the name of a file": sql("INSERT INTO files VALUES (x'00ff', 1, x'00')"),
    "name with a NUL": sql("UPDATE files SET name = name || char(0) || 'b'"),
    "name elsewhere": sql("UPDATE files SET name = replace(name, 'snapshots/', 'snapshots/../../')"),
    "huge step of a state": many("files", states([10**17])),
    "many states": many("files", states(range(6, 506))),
    "blob for a fact": sql("UPDATE facts SET value = x'00ff' WHERE key = 'engine'"),
    "blob for a key": sql("UPDATE facts SET key = x'00ff' WHERE key = 'engine'"),
    "fact of 62 MB": fact("note", "n" * 62_000_000),
    "deep fact": sql(("INSERT OR REPLACE INTO facts VALUES ('fork', ?)", ("[" * 100_000,))),
    "steering note": fact("note", STEERING),
    "steering reason": fact("reason", STEERING),
    "steering name of a parent": fact(
        "fork", {"parent": STEERING, "directory": "", "at": 1, "changed": {STEERING: STEERING}}
    ),
    "unknown device": fact("device", "warp:9"),
    "cuda device": fact("device", "cuda:99"),
    "meta device": fact("device", "meta"),
    "huge planned steps": fact("steps", 2**63 - 1),
    "negative planned steps": fact("steps", -5),
    "huge rows": within("data", "rows", value=2**62),
    "negative rows": within("data", "rows", value=-1),
    "negative batch size": within("batches", "batch_size", value=-7),
    "zero batch size": within("batches", "batch_size", value=0),
    "huge batch size": within("batches", "batch_size", value=2**62),
    "no steps per epoch": within("batches", "steps_per_epoch", value=0),
    "strides of nothing": within("data_file", "strides", value={"x": [0, 0], "y": []}),
    "huge strides": within("data_file", "strides", value={"x": [2**62, 2**62]}),
    "negative strides": within("data_file", "strides", value={"x": [-1, -1]}),
    "data elsewhere": within("data_file", "file", value="../../../etc/passwd"),
    "huge threads": within("numerics", "threads", value=10**9),
    "unknown dtype": within("numerics", "default_dtype", value="float1"),
    "huge numbers of programs": within(
        "engine", "programs",
        value=[{"file": "programs/1.json", "steps": "every", "since": n} for n in range(1, 3001)],
    ),
    "huge number of a program": within("engine", "programs", 0, value=2**63),
    "negative number of a program": other_program,
    "numbers that are truth values": numbers(True),
    "numbers that are NaN": numbers(float("nan")),
    "huge whole numbers": numbers(10**400),
    "earlier huge": fact("earlier", []),
    "200,001 operations": program(_many_operations),
    "program without storages": program(lambda data: data.pop("storages")),
    "program that is a list": program_text("[]"),
    "program that is deep": program_text("[" * 200_000),
    "program with huge shapes": program(
        lambda data: [tensor.update(shape=[2**40] * 8) for tensor in data["tensors"].values()]
    ),
    "state that is no JSON": metadata("{"),
    "state that is a list": metadata("[1]"),
    "state with a strange optimizer": metadata('{"step": 0, "optimizer": 5, "groups": "x"}'),
    "state with huge settings": metadata(json.dumps({"step": 2**70, "groups": [{"lr": "x"}]})),
    "state that is cut": lambda run: os.truncate(run / "snapshots/000000/rest.safetensors", 12),
    "state with another position of a generator": tensors(
        REST, lambda found: found["generator/numpy.position"].fill_(2**40)
    ),
    "state with a generator of another shape": tensors(
        REST, lambda found: found.update({"generator/numpy.gauss": torch.zeros(3, 5, 7)})
    ),
    "state without a generator": tensors(REST, lambda found: found.pop("generator/python")),
    "state with a torch generator of noise": tensors(
        REST, lambda found: found.update({"generator/torch": torch.ones(7, dtype=torch.uint8)})
    ),
    "state with another shape": tensors(
        "snapshots/000000/parameters.safetensors",
        lambda found: found.update({"0.weight": torch.zeros(3, 5, 7)}),
    ),
    "data without y": tensors("data.safetensors", lambda found: found.pop("y")),
    "data with another y": tensors(
        "data.safetensors", lambda found: found.update(y=torch.zeros(64, 10, dtype=torch.int64))
    ),
    "data of another shape": tensors(
        "data.safetensors", lambda found: found.update(x=torch.zeros(64, 3))
    ),
    "data with too few targets": tensors(
        "data.safetensors", lambda found: found.update(y=torch.zeros(3, 10))
    ),
    "data that is a number": tensors(
        "data.safetensors", lambda found: found.update(y=torch.tensor(1.0))
    ),
    "experiment that is huge": lambda run: (run / "experiment.toml").write_text("a=1\n" * 1_000_000),
    "text for the database": lambda run: (run / "run.sqlite").write_text("nothing"),
    "pipe for a lock": pipe_for_a_lock,
    "database is a link": linked("run.sqlite"),
    "log is a link": linked("run.sqlite-wal"),
    "lock is a link": linked("run.lock"),
    "programs are a link": linked("programs"),
    "states are a link": linked("snapshots"),
    "changes are a link": linked("changes"),
    "data is a link": linked("data.safetensors"),
    "experiment is a link": linked("experiment.toml"),
    "database with another name": hard_linked,
}  # fmt: skip
