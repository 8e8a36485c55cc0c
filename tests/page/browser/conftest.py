"""The page in a browser: the real server, driven as a user would.

Most tests only look, and share a server and a window (`visit`). Those that change a run change a copy
of it beside the others (`copied`); those that stop the server, or count what is there, start one of
their own (`view`), and windows of their own (`open_page`).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import count

import pytest
from tests.page.browser.places import at
from tests.page.serving import PATIENCE, remove

NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
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


# While it is driven, an event loop runs in the thread of the tests, which other tests cannot bear.
@pytest.fixture(scope="package")
def browser(chromium):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE)
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
            self.process.wait(PATIENCE)
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
def train(recorded):
    """Start `everystep train` in the same directory; it is killed at the end, and its run removed."""
    with contextlib.ExitStack() as stack:

        def start(name, *arguments):
            command = [*EVERYSTEP, "train", "--quiet", "--run", f"runs/{name}", *map(str, arguments)]
            stack.callback(remove, recorded / name)
            training = stack.enter_context(subprocess.Popen(command, cwd=recorded.parent))
            stack.callback(training.kill)
            return training

        yield start


#: What moves on the page would take the processor from what it shows.
OPTIONS = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}


class Window:
    """A separate profile with an open page, and the messages of its consoles."""

    def __init__(self, browser, **options):
        self.said = []
        self.context = browser.new_context(**OPTIONS | options)
        self.context.set_default_timeout(1000 * PATIENCE)
        self.context.on("console", self.hear_console)
        self.context.on("weberror", lambda one: self.hear(str(one.error)))
        # Past the first route of a page, Chromium may send requests that a key makes at once.
        self.context.route("**/asked-by-no-test", lambda route: route.continue_())
        self.page = self.context.new_page()

    def hear_console(self, message):
        address = message.location["url"]
        # The picture of a run that another test has removed at that moment is not there.
        is_late = "404" in message.text and address.endswith("/sparkline")
        if message.type in ("error", "warning") and not is_late:
            self.hear(f"{message.text} {address}")

    def hear(self, text):
        self.said.append(text)

    def check(self, expected):
        """Only expected messages are allowed; `expected`: parts of texts."""
        unexpected = [text for text in self.said if not any(part in text for part in expected)]
        self.said.clear()
        assert not unexpected

    def close(self):
        self.context.close()


@pytest.fixture
def open_page(browser):
    """Open an address in a separate window; its console must have no unexpected messages."""
    with contextlib.ExitStack() as stack:

        def open_page(address=None, *, expected=(), **options):
            window = Window(browser, **options)
            stack.callback(window.check, expected)
            stack.callback(window.close)
            if address is not None:
                window.page.goto(address)
            return window.page

        yield open_page


def record(directory):
    """Record the chapter, a fork of it, digits, and a run that diverges."""
    import everystep

    train = partial(everystep.train_experiment, progress=False)
    chapter = train("two-layer", run=directory / "chapter")
    chapter.fork(137, lr=2e-4, run=directory / "fork", progress=False)
    train("two-layer", {"optimizer.lr": 1e-2, "steps": 30}, run=directory / "diverged")
    train("digits", {"epochs": 8}, run=directory / "digits")


@pytest.fixture(scope="session")
def recorded(made_once, tmp_path_factory):
    """These runs, trained once; each worker of the test run has a copy, to which tests add others."""
    copy = tmp_path_factory.mktemp("recorded") / "runs"
    return shutil.copytree(made_once("recorded", record), copy)


@pytest.fixture(scope="session")
def shared(chromium, recorded):
    """A server of the recorded runs, for all tests that leave them as they are."""
    served = start_view(directory=recorded.parent)
    yield served
    served.stop()


numbers = count(1)


@pytest.fixture
def copied(recorded):
    """Copy a recorded run, within the shared server's directory; it is removed at the end."""
    with contextlib.ExitStack() as stack:

        def copied(name):
            copy = recorded / f"{name}-{next(numbers)}"
            stack.callback(remove, copy)
            return shutil.copytree(recorded / name, copy)

        yield copied


#: Goes elsewhere as a link would; by way of a place at which nothing goes on.
GO = """path => {
  for (const place of ["/compare", path]) {
    history.pushState(null, "", place);
    dispatchEvent(new PopStateEvent("popstate"));
  }
  document.activeElement?.blur();
  scrollTo(0, 0);
}"""


@pytest.fixture(scope="package")
def windows(browser, shared):
    """Windows that stay open from test to test, by their options: the page is loaded but once."""
    opened = {}

    def window(**options):
        key = repr(sorted(options.items()))
        if key in opened and opened[key].page.locator("dialog").count():
            opened.pop(key).close()  # the test before has failed
        if key not in opened:
            opened[key] = Window(browser, **options)
            opened[key].page.goto(at(shared, "/compare"))
        return opened[key]

    yield window
    for each in opened.values():
        each.close()


@pytest.fixture
def visit(windows, copied, train):
    """Go to a place of the shared server; the console must have no unexpected messages."""
    with contextlib.ExitStack() as stack:

        def visit(path, *, viewport=OPTIONS["viewport"], color_scheme="light", expected=(), **options):
            window = windows(**options)
            stack.callback(window.check, expected)
            page = window.page
            stack.callback(page.evaluate, GO, "/compare")
            page.mouse.move(0, 0)
            page.set_viewport_size(viewport)
            page.emulate_media(color_scheme=color_scheme)
            page.evaluate(GO, path)
            return page

        yield visit
