"""What results look like where Python shows them: short, whatever they hold."""

import pytest

import everystep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shown") / "run"
    return everystep.train_experiment("two-layer", {"steps": 20}, directory=directory, progress=False)


def test_a_step_and_what_is_in_it_are_shown_in_a_line_each(run):
    step = run[7]
    assert repr(step).startswith("<everystep step 7: loss ")
    assert repr(step.batch) == "<batch: x (64, 1000) torch.float32, y (64, 10) torch.float32>"
    assert repr(step.operations[0]) == (
        "<aten.addmm.default, forward of 0: parameter/0.bias (100,), x (64, 1000), "
        "parameter/0.weight~1 (1000, 100) -> addmm (64, 100)>"
    )
    assert len(repr(step.operations)) < 4000
    assert repr(step.updates["2.bias"]).startswith("<update of (10,) torch.float32, relative size ")


def test_a_notebook_shows_a_step_as_the_terminal_does(run):
    shown = run[7]._repr_html_()
    assert shown.startswith("<pre") and "relu(#0)" in shown and "step 7 of 20" in shown
    assert "bit-identical" in shown
    steps = list(run[3:5])
    assert [step._repr_html_().count("step 3 of 20") for step in steps] == [1, 0]


def test_answers_are_shown_in_a_line(run):
    verified = run.verify(processes=1, progress=False)
    assert repr(verified) == (
        f"<verification: 20 steps and {verified.snapshots} snapshots replay bit-identical>"
    )
    found = run.when("loss > 0", "all", progress=False)
    assert repr(found) == "<found at steps 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 10 more>"
    assert repr(run.when("loss < 0", progress=False)) == "<found at no step>"
    measured = run.measure("loss * 2", name="twice", progress=False)
    assert repr(measured).startswith("<measured twice: 20 values, 1257 at step 1, ")
    assert repr(run.diff(run, progress=False)).endswith(": all that was compared is the same>")
    fork = run.fork(5, lr=1e-3, progress=False)
    assert "they part in step 6 at operation #11, aten.mul.Tensor" in repr(
        run.diff(fork, progress=False)
    )
