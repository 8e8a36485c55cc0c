"""Where only a run's own files may be read, an experiment reads none."""

import pytest

import everystep
from everystep.errors import UsageError
from everystep.experiment.files import ONLY_OWN_FILES


def test_a_table_is_not_read_where_only_own_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv(ONLY_OWN_FILES, "1")
    with pytest.raises(UsageError, match=r"is outside the run, in .*wine\.csv; it is not read here"):
        everystep.train_experiment("wine", {"epochs": 1}, progress=False)
    assert not list(tmp_path.iterdir())


def test_arrays_are_not_read_either(monkeypatch):
    settings = {"data": {"source": "arrays", "x": "/etc/x.npy", "y": "/etc/y.npy"}, "epochs": 1}
    monkeypatch.setenv(ONLY_OWN_FILES, "1")
    with pytest.raises(UsageError, match=r"x\.npy; it is not read here"):
        everystep.train_experiment("two-layer", settings, progress=False)


def test_what_is_drawn_or_bundled_is_made(monkeypatch):
    monkeypatch.setenv(ONLY_OWN_FILES, "1")
    assert len(everystep.train_experiment("two-layer", {"steps": 2}, progress=False)) == 2
