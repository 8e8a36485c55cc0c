"""What a process beside the server says reaches the server whole, and what happens to it is reported."""

import asyncio
import textwrap

import pytest
from tests.page.serving import PATIENCE

from everystep.page.processes import Child, Ended


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Let a process do something, and a function of ours talk with it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def talk(does, use):
        head = "import json, sys, time\nfrom everystep.page.processes import Speaker\n"
        (tmp_path / "a_child.py").write_text(head + textwrap.dedent(does))

        async def main():
            child = await Child.begin("a_child")
            try:
                return await asyncio.wait_for(use(child), PATIENCE)
            finally:
                await child.kill()

        return asyncio.run(main())

    return talk


def test_bytes_and_lines_arrive_as_they_were_said_and_prints_do_not(child):
    does = """
        speaker = Speaker.begin()
        asked = json.loads(sys.stdin.buffer.readline())
        print("no message")
        speaker.say("first", asked, b"1\\n{\\x00" * 1000)
        speaker.say("second", {})
    """

    async def use(child):
        await child.ask({"text": "\u2603\n"})
        said = [await child.hear(), await child.hear()]
        with pytest.raises(Ended, match=r"^has ended \(exit code 0\)$"):
            await child.hear()
        return said

    first, second = child(does, use)
    assert first == ("first", {"text": "\u2603\n"}, b"1\n{\x00" * 1000)
    assert second == ("second", {}, b"")
