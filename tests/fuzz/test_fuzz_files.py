"""Random tables, experiments and altered runs are read as they are, or refused in words."""

import shutil

import pytest
from benchmarks.torture_files import shown, small_run
from hypothesis import given, settings
from tests.fuzz.experiments import EXPERIMENTS, load_and_compare
from tests.fuzz.run_directories import ALTERATIONS, alter_and_look
from tests.fuzz.tables import TABLES, read_and_compare

pytestmark = pytest.mark.filterwarnings("ignore")


@settings(derandomize=True, max_examples=80)
@given(table=TABLES)
def test_a_random_table(table, tmp_path_factory):
    read_and_compare(table, tmp_path_factory.getbasetemp())


@settings(derandomize=True, max_examples=50)
@given(experiment=EXPERIMENTS)
def test_an_experiment_with_random_mistakes(experiment, tmp_path_factory):
    load_and_compare(experiment, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    run = small_run(folder / "run")
    expected, _ = shown(shutil.copytree(run, folder / "copy"))
    return run, expected, folder


@settings(derandomize=True, max_examples=15)
@given(alterations=ALTERATIONS)
def test_a_run_with_several_things_altered(alterations, recorded):
    alter_and_look(alterations, *recorded)
