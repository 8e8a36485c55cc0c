"""Runs written by hand, the application asked without a server, and a real server."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx

from everystep.page.app import application
from everystep.page.guard import Guard, cookie_of, token_of
from everystep.recording.database import Database

PORT = 8137
#: Seconds after which something is taken to hang, on the busiest machine.
PATIENCE = 120


def written(directory, losses=(), measurements=(), **facts):
    directory.mkdir()
    database = Database.create(directory / "run.sqlite")
    with database.transaction():
        database.write_losses(1, losses)
        database.write_measurements(measurements)
        known = {"status": "finished", "loss_dtype": "float32", "started": "2026-01-02T03:04:05+00:00"}
        database.write_facts(known | facts)
    database.close()
    return directory


def remove(run):
    """Remove a run that a server may be reading: what reading makes there meanwhile goes, too."""
    for _ in range(200):
        shutil.rmtree(run, ignore_errors=True)
        if not run.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} is still there")


class Application:
    """The application behind its guard, asked as the page asks it."""

    def __init__(self, directory):
        self.token = token_of(directory)
        self.app = Guard(application(directory), self.token)
        self.headers = {"Cookie": f"{cookie_of(self.token)}={self.token}"}

    def ask(self, path, method="GET", headers=None, **options):
        async def answer():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport) as client:
                sent = self.headers if headers is None else headers
                address = f"http://127.0.0.1:{PORT}{path}"
                return await client.request(method, address, headers=sent, **options)

        return asyncio.run(answer())

    def json(self, path, **query):
        answer = self.ask(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextmanager
def served(directory, *arguments):
    """Serve in a separate process: address, client with the cookie, process."""
    command = [sys.executable, "-c", "from everystep.cli import main; main()", "view", str(directory)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--no-browser", *arguments], **pipes) as process:
        try:
            address = process.stdout.readline().strip()
            url = httpx.URL(address)
            base = f"http://{url.host}:{url.port}"
            with httpx.Client(base_url=base, timeout=PATIENCE) as client:
                assert client.get(address).status_code == 200
                yield SimpleNamespace(address=address, client=client, process=process, port=url.port)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(PATIENCE)


@contextmanager
def events(client, path, **headers):
    """Listen to a stream: an iterator of (name, content, id)."""
    with client.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield read_events(answer.iter_lines())


def read_events(lines):
    found = {}
    for line in lines:
        key, _, value = line.partition(": ")
        found[key] = value
        if not line:
            if "event" in found:
                yield found["event"], json.loads(found["data"]), found.get("id")
            found = {}
