import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everystep.errors import ExperimentError
from everystep.experiment.catalogue import parse_layer
from everystep.experiment.specification import built_in, check_iteration, load, parse_setting

CHAPTER = built_in()["two-layer"]


def faults(source, settings=None):
    with pytest.raises(ExperimentError) as caught:
        load(source, settings)
    return {fault.path: fault.problem for fault in caught.value.faults}


def raw():
    experiment = load("two-layer").model_dump(exclude_none=True)
    return {key: dict(value) if isinstance(value, dict) else value for key, value in experiment.items()}


@pytest.mark.parametrize("name", built_in())
def test_a_resolved_experiment_reads_back_as_itself(name, tmp_path):
    experiment = load(name)
    # Editors may begin it with a byte order mark.
    (tmp_path / "again.toml").write_text(experiment.to_toml(), "utf-8-sig")
    assert load(tmp_path / "again.toml") == experiment


def test_all_faults_are_told_at_once_each_with_its_path_and_cure():
    wrong = raw() | {"step": 5, "steps": -3, "seed": "zero"}
    wrong["data"] = {"source": "tabel"}
    wrong["model"] = {
        "layers": ["Linear(1000, 100)", "RelU()", "ReLU", "Linear(100, outputs=10)", 3, "Dropout(2)"]
    }
    wrong["loss"] = {"name": "MSELoss", "reductoin": "sum"}
    wrong["optimizer"] = {"name": "LBFGS"}
    found = faults(wrong)
    assert found["step"] == "unknown key; did you mean steps?"
    assert "at least 0, not -3" in found["steps"]
    assert "integer, not 'zero'" in found["seed"]
    assert "did you mean table?" in found["data.source"]
    assert "did you mean ReLU" in found["model.layers[1]"]
    assert 'parentheses are missing; write "ReLU()"' in found["model.layers[2]"]
    assert "missing a required argument: 'out_features'" in found["model.layers[3]"]
    assert "text, not 3" in found["model.layers[4]"]
    assert "between 0 and 1" in found["model.layers[5]"]
    assert "did you mean reduction" in found["loss.reductoin"]
    assert "closure" in found["optimizer.name"]
    assert len(found) == 11


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        ({"loss.reduction": "elementwise_mean"}, "loss", "old name; write 'mean'"),
        ({"loss.name": "CTCLoss"}, "loss.name", "use a loss of (prediction, target)"),
        ({"optimizer.name": "Adma"}, "optimizer.name", "did you mean Adam"),
        ({"optimizer.lr": -1.0}, "optimizer", "lr must be a finite number >= 0"),
        ({"scheduler.name": "LambdaLR"}, "scheduler.name", "needs a function"),
        ({"scheduler.name": "StepLR"}, "scheduler.step_size", "is missing; StepLR requires it"),
        ({"data.batch_size": 5}, "data.batch_size", "belongs at the top of the file"),
        ({"lrr": 1}, "lrr", "did you mean optimizer.lr?"),
        ({"d-in": 5}, "d-in", "did you mean data.D_in?"),
        ({"data.N": 0}, "data.N", "greater than 0"),
        ({"steps": None}, "", "set either steps or epochs"),
        ({"data.validation": 1.5}, "data.validation", "less than 1"),
        ({"model.layers": []}, "model.layers", "at least 1 item"),
        ({"model": None}, "model", "add [model]"),
    ],
)
def test_a_fault_names_its_place_and_the_cure(settings, path, problem):
    assert problem in faults("two-layer", settings)[path]


def test_a_loss_argument_of_the_wrong_kind_is_found():
    assert "'summ'" in faults("two-layer", {"loss.reduction": "summ"})["loss"]
    assert {*faults("two-layer", {"loss.name": "MSELos", "steps": None})} == {"", "loss.name"}


def test_settings_override_and_steps_and_epochs_replace_each_other():
    experiment = load("two-layer", {"optimizer.lr": 1e-3, "model.layers[1]": "Tanh()", "epochs": 3})
    assert experiment.optimizer.keywords["lr"] == 1e-3
    assert experiment.model.layers[1] == "Tanh()"
    assert (experiment.steps, experiment.epochs) == (None, 3)
    # As `numpy.logspace` and `numpy.arange` have them.
    experiment = load("two-layer", {"optimizer.lr": np.float32(0.5), "seed": np.arange(9)[5]})
    assert {"seed = 5", "lr = 0.5"} <= {*experiment.to_toml().splitlines()}
    assert check_iteration(steps=np.int64(3)).steps == 3
    for path in ("model.layers[9]", "[0]", "..."):
        assert "no such key or index" in faults("two-layer", {path: "Tanh()"})[path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=1e-3", ("optimizer.lr", 1e-3)),
        ("device=cuda:1", ("device", "cuda:1")),
        ("model.layers=['ReLU()']", ("model.layers", ["ReLU()"])),
        ("a=true", ("a", True)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_a_setting_is_toml_or_a_bare_string(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["optimizer.lr", "=3", ""])
def test_a_setting_without_a_path_is_refused(text):
    with pytest.raises(ExperimentError, match="path=value"):
        parse_setting(text)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ExperimentError, match="did you mean two-layer"):
        load("two-layers")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ExperimentError, match=r"broken\.toml is not valid TOML"):
        load(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        load(tmp_path / "latin.toml")
    with pytest.raises(ExperimentError, match="cannot be read"):
        load(tmp_path)


@given(st.text(max_size=60))
def test_no_text_of_a_layer_does_anything_but_parse_or_say_why_not(text):
    try:
        name, *_ = parse_layer(text)
    except ValueError:
        return
    assert name.isidentifier()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('false')",
        "Linear(__import__('os').getpid(), 3)",
        "Linear(*[1, 2])",
        "Linear(**{'in_features': 1})",
        "(lambda: 1)()",
        "Linear(1, 2).__class__",
        "Linear(" + "(" * 5000 + ")",
    ],
)
def test_code_in_a_layer_is_refused(text):
    with pytest.raises(ValueError, match=r"literal|write only the name|not a layer|cannot be read|\*\*"):
        parse_layer(text)


def test_a_relative_path_is_relative_to_the_file_of_the_experiment(tmp_path):
    (tmp_path / "sub").mkdir()
    text = built_in()["wine"].read_text().replace("wine.csv", "mine.csv")
    (tmp_path / "sub" / "mine.toml").write_text(text)
    (tmp_path / "sub" / "mine.csv").write_text("a,cultivar\n1,x\n")
    assert load(tmp_path / "sub" / "mine.toml").data.path == str(tmp_path / "sub" / "mine.csv")
    assert load("wine").data.path.endswith("builtin/wine.csv")
