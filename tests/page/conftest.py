"""A state directory, runs and servers of the tests' own."""

from contextlib import ExitStack, chdir

import pytest
from tests.page.serving import Application, served, written


@pytest.fixture(autouse=True, scope="session")
def a_state_of_its_own(tmp_path_factory):
    """The secret of the tests is none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def shelf(tmp_path):
    """A directory for runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def write_run(shelf):
    """Write a run of losses and measurements; returns its directory."""

    def write_run(name, losses=(), measurements=(), **facts):
        return written(shelf / name, losses, measurements, **facts)

    return write_run


@pytest.fixture
def page(shelf):
    """The application for the runs in `shelf`."""
    return Application(shelf)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of a directory that begins empty; each test has runs of its own there."""
    directory = tmp_path_factory.mktemp("served") / "runs"
    directory.mkdir()
    with ExitStack() as stack:
        with chdir(directory):  # that of the test will be removed
            server = stack.enter_context(served(directory))
        server.directory = directory
        yield server
