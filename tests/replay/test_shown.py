"""What results look like where Python shows them: short, whatever they hold."""

import copy
import pickle
import re
from html import escape, unescape

import pytest

import everystep
from everystep.errors import UsageError
from everystep.views.formatting import counted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shown") / "run"
    return everystep.train_experiment("two-layer", {"steps": 20}, run=directory, progress=False)


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
        f"<verification: 20 steps and {counted(verified.snapshots, 'snapshot')} replay bit-identical>"
    )
    found = run.when("loss > 0", "all", progress=False)
    assert repr(found) == "<found at steps 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 10 more>"
    assert repr(run.when("loss < 0", progress=False)) == "<found at no step>"
    measured = run.measure("loss * 2", name="twice", progress=False)
    assert repr(measured).startswith("<measured: twice: 20 values, from ")
    assert repr(run.diff(run, progress=False)).endswith(
        "snapshot up to step 20 is identical, bit for bit.>"
    )
    fork = run.fork(5, lr=1e-3, progress=False)
    assert "the first operation that differs is #12 of step 6, aten.mul.Tensor" in repr(
        run.diff(fork, progress=False)
    )


def test_a_notebook_shows_answers_as_the_terminal_prints_them(run, everystep_command):
    fork = run.fork(5, lr=1e-3, run="./fork", progress=False)
    names = [str(run.directory), str(fork.directory)]
    answers = {
        ("verify", names[0]): run.verify(processes=1, progress=False),
        ("diff", *names): run.diff(fork, progress=False),
        ("when", names[0], "loss > 9", "--all"): run.when("loss > 9", "all", progress=False),
        ("first-nonfinite", names[1]): fork.first_nonfinite(progress=False),
        ("measure", names[0], "loss * 3", "--name", "a<b"): run.measure(
            "loss * 3", name="a<b", overwrite=True, progress=False
        ),
    }
    assert answers.pop(("first-nonfinite", names[1])) is None
    for command, answer in answers.items():
        overwrite = ["--overwrite"] if command[0] == "measure" else []
        _, printed, _ = everystep_command(*command, *overwrite)
        shown = answer._repr_html_()
        text = re.fullmatch(r"<pre style=[^>]*>(.*)</pre>", shown, re.DOTALL)[1]
        assert unescape(text) == printed.rstrip("\n"), command
        assert "<b" not in text
    assert "no step matches" in run.when("loss < 0", progress=False)._repr_html_()
    again = pickle.loads(pickle.dumps(answers["diff", *names]))
    assert again._repr_html_() == answers["diff", *names]._repr_html_()
    for opened in (run[3:5], run.why(3, "loss")):  # with the opened steps of a run
        for again in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
            assert repr(again) == repr(opened)
    with pytest.raises(UsageError, match="expected runs to draw, not 'fork'"):
        run.plot("fork")


def test_the_origin_of_a_nan_is_shown_in_a_notebook(everystep_command):
    run = everystep.train_experiment("two-layer", {"steps": 12, "optimizer.lr": 10.0}, progress=False)
    _, printed, _ = everystep_command("first-nonfinite", run.name)
    assert escape(printed.rstrip("\n")) in run.first_nonfinite(progress=False)._repr_html_()


def test_the_report_is_a_page_that_a_notebook_shows_and_a_table_has_later_measurements(run, tmp_path):
    report = run.report()
    assert re.fullmatch("<report of run: [0-9]+ kB of HTML; save.path. writes it>", repr(report))
    page = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<]*></iframe>', report._repr_html_())[1]
    assert unescape(page) == report
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report
    with pytest.raises(UsageError, match=r"the directory .*nowhere does not exist"):
        report.save(tmp_path / "nowhere" / "report.html")
    run.measure("step / 2", name="half", overwrite=True, progress=False)
    table = run.table()
    assert table.frame["half"].to_list() == [step / 2 for step in range(1, 21)]
    assert ">half</th>" in table._repr_html_() or '"half"' in table._repr_html_()


def test_answers_are_equal_if_they_have_the_same_bits():
    parent = everystep.train_experiment("two-layer", {"steps": 3}, progress=False)
    again, fork = everystep.open(parent.name), parent.fork(1, lr=0.5, progress=False)
    for ask in (
        lambda run: run[2],
        lambda run: run[2].batch,
        lambda run: run.rows(2),
        lambda run: run.rerun(precision="float64", progress=False),
        lambda run: run.diff(fork, progress=False),
    ):
        assert ask(parent) == ask(again)
    assert parent[2] != parent[1] and parent.rows(2) != parent.rows(1) and parent[2] != 2


def test_jupyter_shows_an_answer_once_and_no_warnings(monkeypatch, recwarn):
    """rich displays what a console prints there, and warns where a bar lacks ipywidgets."""
    run = everystep.train_experiment("two-layer", {"steps": 3}, progress=False)
    displayed = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *given: displayed.append(given))
    assert "step 2 of 3" in run[2]._repr_html_() and "step 2" in run.why(2, "loss")._repr_html_()
    assert run.verify().is_exact
    assert not displayed and not [each for each in recwarn if "ipywidgets" in str(each.message)]
