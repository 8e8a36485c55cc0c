"""The page in a browser: the real server, driven as a user would.

Most tests only look, and share one server (`visit`). Those that change a run change a copy of it beside
the others (`copied`); those that stop the server, or count what is there, start one of their own (`view`).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import count

import pytest
from tests.page.browser.places import at

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: A browser that looks for nothing outside this machine.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVERYSTEP = [sys.executable, "-c", "from everystep.cli import main; main()"]


@pytest.fixture(scope="session")
def chromium():
    found = os.environ.get("EVERYSTEP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt install chromium, or EVERYSTEP_CHROMIUM=path)")
    return found


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # a worker imports torch before it opens the first step
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@dataclass
class View:
    """`everystep view`, running."""

    process: subprocess.Popen
    address: str

    @property
    def origin(self):
        return self.address.partition("?")[0].rstrip("/")

    @property
    def port(self):
        return int(self.address.split(":")[2].partition("/")[0])

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(10)
        self.process.stdout.close()


def start_view(*arguments, directory, port=None):
    """Start `everystep view` in a directory; return it when it answers."""
    command = [*EVERYSTEP, "view", "--no-browser", *map(str, arguments)]
    if port is not None:
        command += ["--port", str(port)]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), address
    return View(process, address)


@pytest.fixture
def view(tmp_path):
    """Start `everystep view` in the test's directory, once or again; it is stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, port=None):
            started = start_view(*arguments, directory=tmp_path, port=port)
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def train(tmp_path):
    """Start `everystep train` in the test's directory; it is killed at the end."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            command = [*EVERYSTEP, "train", "--quiet", *map(str, arguments)]
            training = stack.enter_context(subprocess.Popen(command, cwd=tmp_path))
            stack.callback(training.kill)
            return training

        yield start


@pytest.fixture
def open_page(browser):
    """Open pages in a profile of their own; nothing may be said in their consoles but what is expected.

    Gives a function of an address and of what is expected, parts of texts.
    """
    said = []
    with contextlib.ExitStack() as stack:

        def open_page(address=None, *, expected=(), **options):
            context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
            stack.callback(context.close)
            context.set_default_timeout(30_000)

            def hear(text):
                if not any(part in text for part in expected):
                    said.append(text)

            context.on("console", lambda one: one.type in ("error", "warning") and hear(one.text))
            context.on("weberror", lambda one: hear(str(one.error)))
            page = context.new_page()
            if address is not None:
                page.goto(address)
            return page

        yield open_page
    assert not said


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Some runs, trained once: the chapter's, a fork of it, digits, and one that diverges."""
    import everystep

    directory = tmp_path_factory.mktemp("recorded") / "runs"
    train = everystep.train_experiment
    chapter = train("two-layer", directory=directory / "chapter", progress=False)
    chapter.fork(137, lr=2e-4, directory=directory / "fork", progress=False)
    short = {"optimizer.lr": 1e-2, "steps": 30}
    train("two-layer", short, directory=directory / "diverged", progress=False)
    train("digits", {"epochs": 8}, directory=directory / "digits", progress=False)
    return directory


@pytest.fixture(scope="session")
def shared(recorded):
    """A server of the recorded runs, for all tests that leave them as they are."""
    served = start_view(directory=recorded.parent)
    yield served
    served.stop()


@pytest.fixture
def visit(shared, open_page):
    """Open a place of the shared server."""

    def visit(path, **options):
        return open_page(at(shared, path), **options)

    return visit


numbers = count(1)


@pytest.fixture
def copied(recorded):
    """Copy a recorded run, within the shared server's directory; it is removed at the end."""
    with contextlib.ExitStack() as stack:

        def copied(name):
            copy = recorded / f"{name}-{next(numbers)}"
            stack.callback(shutil.rmtree, copy, ignore_errors=True)
            return shutil.copytree(recorded / name, copy)

        yield copied
