"""The built-in experiments reach the results in the documentation."""

import pytest

import everystep


def test_settings_hold_for_an_experiment_in_every_form():
    from everystep.experiment.specification import built_in, load

    loaded = load("two-layer")
    forms = ["two-layer", built_in()["two-layer"], loaded, loaded.model_dump(exclude_none=True)]
    runs = [everystep.train_experiment(form, {"steps": 3}, progress=False) for form in forms]
    assert all(len(run.losses) == 3 and run.losses.equals(runs[0].losses) for run in runs)


def test_an_experiment_has_the_same_losses_whatever_takes_its_steps():
    runs = []
    for engine in ("auto", "program", "eager"):
        settings = {"steps": 20, "engine": engine}
        runs.append(everystep.train_experiment("diabetes", settings, progress=False))
    assert all(run.losses.equals(runs[0].losses) for run in runs)
    assert [run.facts.training.engine.eager_from for run in runs] == [None, None, 1]


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(("name", "least"), [("wine", 0.95), ("digits", 0.97)])
def test_classes_are_told_apart(name, least):
    run = everystep.train_experiment(name, progress=False)
    assert [*run.measured("validation_accuracy").values()][-1] >= least


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_diabetes_is_predicted_at_least_as_well_as_scikit_learn_does():
    from benchmarks.scikit_learn import r2_of_both

    ours, theirs = r2_of_both(seed=0)
    assert ours >= theirs
