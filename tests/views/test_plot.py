import shutil
import xml.etree.ElementTree as ET

import pytest

import everystep
from everystep.errors import UsageError
from everystep.recording.recorded_run import RecordedRun
from everystep.views.plot import loss_plot, save_plot, sweep_plot

NAN, INF = None, float("inf")  # NULL in a run's database means NaN


def layers(plot):
    """Return the kinds of what is drawn."""
    return [type(layer.geom).__name__ for layer in plot.layers]


def texts(path):
    """Return an SVG plot's texts; matplotlib draws them as outlines, and names each in a comment."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    return [one.text.strip() for one in ET.parse(path, parser).iter() if one.tag is ET.Comment]


def test_draws_points_of_loss_against_iteration(trained):
    run = RecordedRun(trained)
    plot = loss_plot([run])
    assert layers(plot) == ["geom_point"]
    assert (plot.labels.x, plot.labels.y, plot.labels.title) == ("iteration", "loss", "run")
    assert plot.data["step"].to_list() == run.losses["step"].to_list()
    assert plot.data["value"].to_list() == run.losses["loss"].to_list()
    assert not plot.labels.caption


def test_several_runs_are_told_apart_by_a_legend(run_of, tmp_path):
    plot = loss_plot([run_of([3.0, 2.0], name="one"), run_of([4.0, 1.0], name="two")])
    assert plot.data["run"].to_list() == ["one", "one", "two", "two"]
    save_plot(plot, tmp_path / "loss.svg")
    assert {"one", "two", "iteration", "loss"} <= set(texts(tmp_path / "loss.svg"))


def test_runs_of_the_same_name_are_called_by_their_directories(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "elsewhere" / trained.name)
    plot = loss_plot([RecordedRun(trained), RecordedRun(other), RecordedRun(trained)])
    assert set(plot.data["run"]) == {str(trained), str(other)}
    assert len(plot.data) == 2 * len(RecordedRun(trained).losses)


def test_a_log_axis_leaves_out_what_is_not_positive_and_says_so(run_of):
    run = run_of([10.0, 0.0, -1.0, 0.1])
    plot = loss_plot([run], log=True)
    assert plot.data["value"].to_list() == pytest.approx([10.0, 0.1])
    assert plot.labels.caption == "changed: the log axis omits 2 losses of 0 or less"
    assert len(loss_plot([run]).data) == 4


def test_losses_that_are_not_finite_are_marked_and_counted(run_of):
    plot = loss_plot([run_of([3.0, INF, 2.0, NAN, 1.0])])
    assert layers(plot) == ["geom_point", "geom_rug"]
    assert plot.layers[1]._data["step"].to_list() == [2, 4]
    assert plot.data["step"].to_list() == [1, 3, 5]
    assert plot.labels.caption == "changed: the loss is not finite at 2 of 5 steps, first inf at step 2"


def test_a_line_has_a_gap_where_it_is_not_finite_and_a_caption_of_all_steps(run_of):
    values = [("a", step, value) for step, value in enumerate([0.5, NAN, INF, 0.25], 1)]
    plot = loss_plot([run_of([1.0] * 4, values)], measurements="a")
    assert plot.layers[1]._data["value"].isna().to_list() == [False, True, True, False]
    assert plot.labels.caption.startswith("changed, a: the value is not finite at 2 of 4 steps, first")
    # Of many steps, few are drawn.
    plot = sweep_plot([run_of([1.0] * 3000 + [NAN] * 900 + [-1.0] * 100, name="swept")], [{}], log=True)
    assert plot.data["value"].isna().any()
    assert plot.labels.caption.splitlines() == [
        "swept: the loss is not finite at 900 of 4,000 steps, first nan at step 3,001",
        "swept: the log axis omits 100 losses of 0 or less",
    ]


def test_measurements_are_lines_of_the_runs_that_have_them(run_of, tmp_path):
    one = run_of([3.0, 2.0], [("validation_loss", 1, 2.5), ("validation_loss", 2, 1.5)], name="one")
    two = run_of([4.0, 1.0], name="two")
    for runs in ([one], [one, two]):
        plot = loss_plot(runs, measurements=["validation_loss"])
        assert layers(plot) == ["geom_point", "geom_line"]
        assert plot.labels.y == "loss"
        save_plot(plot, tmp_path / "loss.svg")
        assert "validation_loss" in texts(tmp_path / "loss.svg")


def test_an_unknown_measurement_is_answered_with_the_nearest(run_of):
    run = run_of([1.0], [("validation_loss", 1, 2.5)])
    with pytest.raises(UsageError, match="did you mean validation_loss"):
        loss_plot([run], measurements=["validaton_loss"])


def test_a_long_run_is_thinned_without_losing_a_spike(run_of):
    losses = [1 / step for step in range(1, 50_001)]
    losses[12_344] = 98.75
    plot = loss_plot([run_of(losses)])
    assert 3000 < len(plot.data) < 7000
    assert {1, 12_345, 50_000} <= set(plot.data["step"])


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    ("losses", "log"),
    [
        *((losses, False) for losses in ([], [1.0], [2.0, 2.0], [NAN], [INF, NAN, INF])),
        *((losses, True) for losses in ([], [2.0, 2.0], [0.0, -1.0], [1e-30, 1e30])),
    ],
)
def test_whatever_the_losses_there_is_a_plot(run_of, tmp_path, losses, log):
    measured = [("a", step, NAN) for step, _ in enumerate(losses, 1)]
    plot = loss_plot([run_of(losses, measured)], log=log, measurements=["a"] * bool(losses))
    save_plot(plot, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_name_is_drawn_as_it_is(run_of, tmp_path):
    name = r"<img src=x> $x_$ & {} \$"
    run = run_of([1.0, NAN], [("$\\frac$", 1, 0.5)], name=name)
    save_plot(loss_plot([run], measurements=["$\\frac$"]), tmp_path / "loss.svg")
    ET.parse(tmp_path / "loss.svg")


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")],
)
def test_is_written_as_its_suffix_says_without_a_word(trained, tmp_path, capfd, suffix, start):
    path = tmp_path / f"loss{suffix}"
    save_plot(loss_plot([RecordedRun(trained)]), path)
    assert path.read_bytes().startswith(start)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["loss.jpeg", "loss", "loss.png.txt"])
def test_another_suffix_is_refused_and_those_possible_are_named(trained, tmp_path, name):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        save_plot(loss_plot([RecordedRun(trained)]), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_learning_rate_is_level_until_it_changes(tmp_path):
    changed = {"steps": 12, "scheduler": {"name": "StepLR", "step_size": 4}}
    run = everystep.train_experiment("two-layer", changed, run=tmp_path / "run", progress=False)
    plot = loss_plot([run], measurements=["lr"])
    (line,) = [layer._data for layer in plot.layers if layer.geom.__class__.__name__ == "geom_line"]
    first, second, third = run.measured("lr").values()
    drawn = dict(zip(line["step"], line["value"], strict=True))
    assert drawn == {1: first, 4: first, 5: second, 8: second, 9: third, 12: third}
