"""How fast the page is: its server, first paint, a million steps, jumps, keys, and what it costs idle.

`python -m benchmarks.page [--directory DIR]`. Trains a small network for a million steps and the
chapter's for 100,000 (kept in DIR, and used again if they are there), opens them in Chromium, and prints
a table. The browser is the one on the path, or EVERYSTEP_CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

__all__ = ["MAIN", "browser_started", "main", "page_opened", "served"]

MAIN = "from everystep.cli import main; main()"
LONG, CHAPTER = "million", "chapter"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
STARTS, PAGES, JUMPS, KEYS = 9, 100, 100, 200
IDLE_SECONDS = 20

#: Press a key, and wait until the step it leads to has been drawn and painted; milliseconds.
PRESS = """([key, step]) => new Promise((resolve) => {
  const began = performance.now();
  const title = `Step ${step.toLocaleString("en")} of`;
  const isDrawn = () => document.querySelector(".step h2")?.textContent.startsWith(title);
  const done = () => resolve(performance.now() - began);
  const look = () => isDrawn() ? requestAnimationFrame(done) : setTimeout(look, 1);
  document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  look();
})"""

#: Wait for an element and the frame after it; milliseconds since the page was asked for. Playwright's
#: own waiting looks twice a second.
SHOWN = """(selector) => new Promise((resolve) => {
  const done = () => resolve(performance.now());
  const isShown = () => document.querySelector(selector) !== null;
  const look = () => isShown() ? requestAnimationFrame(done) : setTimeout(look, 5);
  look();
})"""

#: Ask the server, and read all that it answers; milliseconds.
ASK = """async (address) => {
  const began = performance.now();
  const response = await fetch(address);
  if (!response.ok) throw new Error(await response.text());
  await response.json();
  return performance.now() - began;
}"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="keep the runs here, and use them again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.directory or Path(folder)
        _train(directory)
        _print_times("server started and answering", [_start_seconds(directory) for _ in range(STARTS)])
        with served(directory) as (server, address), browser_started() as browser:
            _print_times(
                "first paint, server running", [_paint(browser, address) for _ in range(STARTS)]
            )
            _print_times(
                "a million steps: plot drawn, first time and later",
                [_plot_seconds(browser, address) for _ in range(STARTS)],
            )
            page = page_opened(browser, address, f"/runs/{LONG}")
            for what, query in (
                ("table page of a million, by step", {}),
                ("the same, by loss", {"sort": "loss"}),
                ("the same, by loss, of a range of losses", {"sort": "loss", "low": 0.5}),
            ):
                _print_times(what, _table_seconds(page, query))
            for name in (CHAPTER, LONG):
                _print_steps(page_opened(browser, address, f"/runs/{name}?step=2"), name)
            page.wait_for_timeout(3000)
            _print_idle(server)


def _train(directory: Path) -> None:
    import torch
    from torch import nn

    import everystep

    for name, sizes, rows, steps in (
        (LONG, (8, 16, 2), 16, 1_000_000),
        (CHAPTER, (1000, 100, 10), 64, 100_000),
    ):
        if (directory / name).exists():
            continue
        torch.manual_seed(0)
        x, y = torch.randn(rows, sizes[0]), torch.randn(rows, sizes[2])
        model = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
        optimizer = everystep.GradientDescent(model.parameters(), lr=1e-5)
        loss = nn.MSELoss(reduction="sum")
        everystep.train(model, (x, y), loss=loss, optimizer=optimizer, steps=steps, run=directory / name)


@contextmanager
def served(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve the page of a directory; yields the server's process and the address."""
    command = [sys.executable, "-c", MAIN, "view", str(directory), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(10)


def _start_seconds(directory: Path) -> float:
    began = time.perf_counter()
    with served(directory) as (_, address):
        with urllib.request.urlopen(address) as response:
            response.read()
        return time.perf_counter() - began


@contextmanager
def browser_started() -> Iterator[Any]:
    """Start a browser without a window."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("EVERYSTEP_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


def page_opened(browser: Any, address: str, path: str) -> Any:
    """Return a page that shows a place, in a profile of its own."""
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    base, _, token = address.partition("/?")
    page.goto(f"{base}{path}{'&' if '?' in path else '?'}{token}", wait_until="commit")
    return page


def _paint(browser: Any, address: str) -> float:
    page = page_opened(browser, address, "/")
    page.wait_for_selector("main table tbody tr")
    painted: float = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.context.close()
    return painted / 1000


def _plot_seconds(browser: Any, address: str) -> float:
    """Return how long it takes from asking for the page until the plot stands in it."""
    page = page_opened(browser, address, f"/runs/{LONG}")
    drawn: float = page.evaluate(SHOWN, ".u-over")
    page.context.close()
    return drawn / 1000


def _table_seconds(page: Any, query: dict[str, Any]) -> list[float]:
    starts = np.random.default_rng(0).integers(0, 999_000, PAGES).tolist()
    addresses = [
        f"/api/runs/{LONG}/table?{urlencode(query | {'start': start, 'length': 25})}" for start in starts
    ]
    return [page.evaluate(ASK, address) / 1000 for address in addresses]


def _print_steps(page: Any, name: str) -> None:
    """Print how long steps take to be opened anywhere in a run, and by keys."""
    page.wait_for_selector(".step h2")
    steps = page.evaluate(f"fetch('/api/runs/{name}').then((answer) => answer.json())")["steps"]
    jumps = np.random.default_rng(1).integers(3, steps, JUMPS).tolist()
    times = [page.evaluate(ASK, f"/api/runs/{name}/steps/{step}") / 1000 for step in jumps]
    _print_times(f"{name}: a step anywhere, answered", times)
    middle = steps // 2
    page.keyboard.press("/")
    page.keyboard.type(str(middle))
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Step {middle:,} of").wait_for()
    page.evaluate("document.activeElement.blur()")
    for what, key, way in (("next", "ArrowRight", 1), ("previous", "ArrowLeft", -1)):
        times = []
        for _ in range(KEYS):
            middle += way
            times.append(page.evaluate(PRESS, [key, middle]) / 1000)
        _print_times(f"{name}: {what} step by key, drawn", times)


def _print_idle(server: subprocess.Popen[str]) -> None:
    """Print what the server and its worker do while a finished run is looked at and nothing happens."""
    before = _effort(server.pid)
    time.sleep(IDLE_SECONDS)
    ticks, switches = (now - then for now, then in zip(_effort(server.pid), before, strict=True))
    milliseconds = 1000 * ticks / os.sysconf("SC_CLK_TCK")
    what = f"idle for {IDLE_SECONDS} s, page open"
    print(f"{what:<52}{milliseconds:>8.0f} ms of CPU, {switches} wake-ups")


def _effort(pid: int) -> tuple[int, int]:
    """Return clock ticks and voluntary context switches of a process and its children, all threads."""
    ticks = switches = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (pid, *map(int, children)):
        for task in Path(f"/proc/{each}/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            status = (task / "status").read_text()
            switches += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return ticks, switches


def _print_times(what: str, seconds: list[float]) -> None:
    median, high = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.95))
    print(
        f"{what:<52}{median:>8.1f} ms  95% {high:>8.1f} ms  first {1e3 * seconds[0]:>8.1f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
