"""Arguments that do not fit a public function are named, with what they must be, before it runs."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import everystep
from everystep import Run, UsageError
from everystep.replay.opened_step import Step


@pytest.fixture
def run():
    return everystep.train_experiment("two-layer", {"steps": 3}, progress=False)


def test_an_argument_of_the_wrong_type_is_named_with_what_it_must_be(run):
    for call, said in (
        (lambda: everystep.open(5), "run: must be a text or a path, not 5"),
        (lambda: everystep.runs(None), "directory: must be a text or a path, not None"),
        (lambda: everystep.record(resume=None), "resume: must be True or False, a text or a path, not"),
        (lambda: everystep.record(tags=5), "tags: must be a list, not 5"),
        (lambda: everystep.record(at=True), "at: must be an integer or None, not True"),
        (
            lambda: everystep.record(batch_budget=float("nan")),
            "a number of bytes, such as 2e9, of at least 0, not nan",
        ),
        (
            lambda: everystep.train_experiment("wine", 5),
            "must be a dict with text keys or None, not 5",
        ),
        (
            lambda: everystep.train_experiment(None),
            "a text, a path, a dict with text keys or an exp",
        ),
        (lambda: everystep.sweep("wine", {}, processes=0), "an integer of at least 1 or None, not 0"),
        (
            lambda: run.verify(processes="x"),
            "processes: must be an integer of at least 1 or None, not 'x'",
        ),
        (lambda: run.verify(progress=3), "progress: must be True, False or a function, not 3"),
        (lambda: run.diff("two-layer-1"), "other: must be a run: everystep.open"),
        (lambda: run.measure(5), "question: must be a text or a function, not 5"),
        (lambda: run.measure("loss", name=5), "name: must be a text or None, not 5"),
        (lambda: run.when("loss", "never"), "which: must be 'first', 'last' or 'all', not 'never'"),
        (lambda: run.what_if(1, lr="x"), "lr: must be a number or a list, not 'x'"),
        (lambda: run.what_if(1, lr=1e-3, by=5), "by: must be a text, not 5"),
        (lambda: run.plot(measurements="loss"), "measurements: must be a list, not 'loss'"),
        (lambda: run.table(5), "rows: must be an integer of at least 100, not 5"),
        (lambda: run.table().save(5), "path: must be a text or a path, not 5"),
        (lambda: run.rerun(compare=["two-layer-1"]), "compare: must be a list of runs, not ['two-"),
        (lambda: everystep.sweep("wine", {5: [1]}), "settings: must be a dict with text keys"),
        (lambda: run[1].why(5), "expression: must be a text, not 5"),
        (lambda: run.why(1, "loss", back=-1), "back: must be an integer of at least 0, not -1"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert said in str(error.value)
    with pytest.raises(UsageError) as both:
        run.measure("loss", every=0, overwrite="yes")
    assert [fault.path for fault in both.value.faults] == ["every", "overwrite"]
    assert run.measurements.is_empty() and len(everystep.runs("runs")) == 1


def test_numbers_of_numpy_and_torch_are_numbers(run):
    assert run.measure("loss", name="x", every=np.int64(2), progress=False).values.keys() == {2}
    assert run.why(np.int64(2), "loss", depth=torch.tensor(1)).number.step == 2
    assert run.verify(processes=np.uint8(1), progress=np.False_).is_exact
    assert run.fork(1, lr=np.float32(0.5), run=Path("runs/new"), progress=False).name == "new"
    # A wrong name is reported by Python, where it is called.
    with pytest.raises(TypeError, match="unexpected keyword argument 'process'"):
        run.verify(process=2)


def test_a_recording_is_not_lost_to_a_wrong_argument():
    """A number as the reason made a run that could not be opened; NumPy counts of epochs lost steps."""
    model = torch.nn.Linear(2, 1)
    with everystep.record(model=model) as recording:
        for wrong, said in (
            (lambda: recording.stop(5), "reason: must be a text, not 5"),
            (lambda: recording.epochs(2.5), "count: must be an integer or None, not 2.5"),
            (
                lambda: recording.steps(5),
                "batches: must be iterable, such as a DataLoader or range(100)",
            ),
            (lambda: recording.log(torch.tensor(0.0)), "numbers by name, log(loss=loss), not a Tensor"),
        ):
            with pytest.raises(UsageError) as error:
                wrong()
            assert said in str(error.value)
        for _ in recording.epochs(np.int64(2)):
            for batch in recording.steps([torch.ones(3, 2)] * 2):
                recording.log(loss=model(batch).sum())
    assert len(everystep.open(recording.run.name)) == 4 and recording.run.status == "finished"


def test_every_public_function_is_checked():
    functions = [getattr(everystep, name) for name in everystep.__all__ if name[0].islower()]
    methods = [getattr(Run, name) for name in dir(Run) if name in Run.__dict__]
    functions += [each for each in methods if inspect.isfunction(each) and each.__name__[0] != "_"]
    # These hand all arguments on: to `step.why`, and to nothing.
    others = {"why", "rows", "report"}
    assert all(hasattr(each, "__wrapped__") or each.__name__ in others for each in functions)
    assert hasattr(Step.why, "__wrapped__")
    assert str(inspect.signature(Run.verify)).startswith("(self, *, processes:")
