"""A program as JSON: reading returns what was written, and refuses everything else."""

import copy
import json
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.sealing import seal_files
from torch import nn

import everystep
from everystep.errors import ProgramError, RunError
from everystep.ops.operators import without_autograd
from everystep.program import memory
from everystep.program.bound import BoundProgram
from everystep.program.interpreter import Interpreter
from everystep.program.memory import tensor_on
from everystep.program.operation import Operation
from everystep.program.step_program import Program

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


CPU = torch.device("cpu")


@pytest.fixture
def program(small, make_trainee, program_of):
    return program_of(make_trainee(*small))


def bound(program):
    """Return a program on memory of zeros."""
    interpreter = Interpreter(program, CPU)
    given = {
        name: interpreter.fresh(name) for kind in ("state", "input") for name in program.of_kind(kind)
    }
    state = {n: tensor_on(given[spec.storage], spec) for n, spec in interpreter.state.items()}
    inputs = {n: torch.zeros(given[n].nbytes(), dtype=torch.uint8) for n in program.of_kind("input")}
    return BoundProgram(program, state, inputs, [], CPU)


@pytest.fixture(scope="module")
def tiny():
    """A small program as JSON data."""
    return json.loads(TINY)


TINY = """{
 "format": "everystep program", "version": 1, "torch": "2.13.0",
 "storages": {"x": {"kind": "input", "bytes": 16}, "w": {"kind": "state", "bytes": 16},
  "mul": {"kind": "temporary", "bytes": 16}, "loss": {"kind": "temporary", "bytes": 4}},
 "tensors": {"x": {"dtype": "float32", "shape": [4]}, "w": {"dtype": "float32", "shape": [2, 2]},
  "w~1": {"storage": "w", "dtype": "float32", "shape": [4], "stride": [1]},
  "mul": {"dtype": "float32", "shape": [4]}, "loss": {"dtype": "float32", "shape": []}},
 "operations": [
  {"phase": "forward", "operator": "aten.mul.Tensor", "arguments": ["x", "w~1"], "results": ["mul"]},
  {"phase": "loss", "operator": "aten.sum.default", "arguments": ["mul"], "results": ["loss"]},
  {"phase": "update", "operator": "aten.sub_.Tensor", "arguments": ["w~1", "x"],
   "keywords": {"alpha": 0.5}, "results": ["w~1"]}],
 "loss": "loss"}"""


def changed(data, **changes):
    """Return the program with other values at paths like `operations__0__operator`."""
    data = copy.deepcopy(data)
    for path, value in changes.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split("__")]
        place = data
        for key in way:
            place = place[key]
        place[last] = value
    return json.dumps(data)


def test_a_person_can_read_it(program):
    lines = [line.strip().rstrip(",") for line in program.to_json().splitlines()]
    assert '"parameter/0.weight": {"dtype": "float32", "shape": [8, 4]}' in lines
    assert (
        '{"phase": "forward", "module": "1", "operator": "aten.tanh.default", "arguments": ["addmm"], '
        '"results": ["tanh"]}'
    ) in lines


def test_temporary_memory_is_shared_by_those_that_follow_each_other(make_trainee, program_of):
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.Tanh())]
    data = torch.randn(256, 64), torch.randn(256, 64)
    program = program_of(make_trainee(nn.Sequential(*layers), *data))
    sizes = [each.bytes for each in program.storages.values() if each.kind == "temporary"]
    assert bound(program).temporary_bytes < 0.7 * sum(sizes)


def test_written_by_hand_it_runs(tiny):
    program = Program.from_json(TINY)
    values = {"x": torch.tensor([1.0, 2, 3, 4]), "w": torch.ones(2, 2)}
    live = BoundProgram(program, {"w": values["w"]}, {}, ["x"], CPU)
    live.load({"x": values["x"]})
    with without_autograd():
        live.put([0.5])
        live.run()
    assert live.loss.item() == 10
    assert live.tensor("w").tolist() == [[0.5, 0.0], [-0.5, -1.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "upgrade everystep"),
        ({"format": "another"}, "format"),
        ({"operations__0__operator": "aten.mul.Nothing"}, "mul has no overload Nothing"),
        ({"operations__0__operator": "aten.from_file.default"}, "from_file"),
        ({"operations__0__operator": "aten.set_.source_Tensor"}, "set_"),
        ({"operations__0__operator": "aten.resize_.default"}, "resize_"),
        ({"operations__0__operator": "aten.t_.default"}, "t_"),
        ({"operations__0__operator": "aten.record_stream.default"}, "record_stream"),
        ({"operations__0__operator": "prim.device.default"}, "prim.device.default"),
        ({"operations__0__operator": "aten.__class__.x"}, "__class__"),
        ({"operations__0__arguments": ["x", "nowhere"]}, "nowhere"),
        ({"operations__2__arguments": ["", "x"]}, "unknown tensor ''"),
        ({"operations__0__arguments": ["x"]}, "other"),
        ({"operations__0__arguments": ["x", "w", 1, 2, 3]}, "at most"),
        ({"operations__0__arguments": ["x", {"dtype": "float32"}]}, "other"),
        ({"operations__0__keywords": {"file": 1}}, "at most 2 argument"),
        ({"operations__0__phase": "sideways"}, "phase"),
        ({"operations__0__results": ["loss"]}, "mul"),
        ({"tensors__w__dtype": "float31"}, "float31"),
        ({"tensors__w__shape": [2, 3]}, "w needs 24 bytes of w, which has only 16"),
        ({"tensors__w~1__stride": [-1]}, "stride"),
        ({"tensors__w~1__offset": 1}, "w~1 needs 20 bytes"),
        ({"storages__w__bytes": 2**60}, "bytes"),
        ({"loss": "mul"}, "single number"),
        ({"loss": "gone"}, "gone"),
        ({"operations__0__operator": "optim.Exec.step"}, "Exec"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_wrong_is_named(tiny, changes, message):
    with pytest.raises(ProgramError, match=message):
        Program.from_json(changed(tiny, **changes))


def places(data, way=()):
    yield way
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*way, key))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_program_with_something_changed_is_read_and_runs_or_fails_by_name(tiny, data):
    mutated = copy.deepcopy(tiny)
    way = data.draw(st.sampled_from([way for way in places(mutated) if way]))
    place = mutated
    for key in way[:-1]:
        place = place[key]
    others = [place_of(tiny, other) for other in places(tiny) if other]
    place[way[-1]] = data.draw(st.sampled_from(others) | JSON)
    try:
        program = Program.from_json(json.dumps(mutated))
        with patch.object(memory, "free_memory", return_value=0):  # of this machine, others need some
            live = bound(program)
    except ProgramError:
        return
    # What only the numbers or dtypes show is the kernel's to refuse.
    with without_autograd(), suppress(RuntimeError, IndexError, ValueError, TypeError):
        live.run()


@pytest.mark.parametrize("storage", ["mul", "w"])
def test_a_program_that_needs_more_memory_than_is_free_is_refused(tiny, storage, monkeypatch):
    huge = copy.deepcopy(tiny)
    huge["storages"][storage]["bytes"] = 40_000_000_000
    monkeypatch.setattr(memory, "free_memory", lambda: 15_200_000_000)
    with pytest.raises(ProgramError, match=r"needs 40\.0 GB of memory, but only 15\.2 GB are free"):
        bound(Program.from_json(json.dumps(huge)))


def test_settings_that_torch_asserts_do_not_fit_are_reported(tmp_path):
    layer = nn.Linear(3, 1)
    parts = {"model": layer, "optimizer": torch.optim.RMSprop(layer.parameters())}
    with everystep.record(**parts, run=tmp_path / "run") as recording:
        for x in recording.steps([torch.ones(2, 3)] * 4):
            recording.log(loss=(loss := layer(x).sum()))
            loss.backward()
            parts["optimizer"].step()
            parts["optimizer"].zero_grad()
    for path in (tmp_path / "run" / "programs").iterdir():
        path.write_text(path.read_text().replace('"capturable": [false]', '"capturable": [true]'))
    seal_files(tmp_path / "run")
    with pytest.raises(RunError, match=r"RMSprop\.step: If capturable=True"):
        everystep.open(tmp_path / "run")[3]


def place_of(data, way):
    for key in way:
        data = data[key]
    return data


@pytest.mark.parametrize("names", [("mean", "variance"), ("variance", "mean")])
def test_what_an_operation_writes_is_in_the_order_of_its_arguments(names):
    given = ("x", "w", "b", *names, True, 0.1, 1e-5)
    operator = "aten.native_batch_norm.default"
    written = Operation(phase="forward", operator=operator, arguments=given).written()
    assert tuple(written) == names  # a set has one order for both
