"""The page in a browser: the real server, driven as a user would."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def chromium():
    found = os.environ.get("EVERYSTEP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt install chromium, or EVERYSTEP_CHROMIUM=path)")
    return found


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)  # a worker imports torch before it opens the first step
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
        return self.address.partition("/?")[0]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(10)
        self.process.stdout.close()


def start_view(*arguments, directory, port=None):
    """Start `everystep view` in a directory; return it when it answers."""
    main = "from everystep.cli import main; main()"
    command = [sys.executable, "-c", main, "view", "--no-browser", *map(str, arguments)]
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

        def start(*arguments, directory=tmp_path, port=None):
            started = start_view(*arguments, directory=directory, port=port)
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def open_page(browser):
    """Open pages in a profile of their own; nothing may be said in their consoles but what is expected.

    Gives a function of an address and of what is expected, parts of texts.
    """
    contexts, said = [], []

    def open_page(address=None, *, expected=(), **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)

        def hear(text):
            if not any(part in text for part in expected):
                said.append(text)

        page.on("console", lambda message: message.type in ("error", "warning") and hear(message.text))
        page.on("pageerror", lambda error: hear(str(error)))
        if address is not None:
            page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Some runs, trained once: the chapter's, two forks of it, digits, and one that diverges."""
    import everystep

    directory = tmp_path_factory.mktemp("recorded") / "runs"
    train = everystep.train_experiment
    chapter = train("two-layer", directory=directory / "chapter", progress=False)
    chapter.fork(137, lr=2e-4, directory=directory / "fork", progress=False)
    train("two-layer", {"optimizer.lr": 1e-2}, directory=directory / "diverged", progress=False)
    train("digits", {"epochs": 3}, directory=directory / "digits", progress=False)
    return directory


@pytest.fixture
def runs(recorded, tmp_path):
    """The recorded runs, where a test may change them."""
    return Path(shutil.copytree(recorded, tmp_path / "runs"))
