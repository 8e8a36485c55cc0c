"""docs/why.md does what it says: its code runs, and its commands print what it shows, in its order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.test_tutorial import NUMBER, assert_same_output

PAGE = Path(__file__).parent.parent / "docs" / "why.md"
BLOCK = re.compile(
    r"(<!-- numbers differ between processors -->\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
#: Stands for the rest of what a command prints.
REST = "...\n"


def run(script: str, directory: Path) -> None:
    command = [sys.executable, "-X", "utf8", script]
    done = subprocess.run(command, cwd=directory, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_stories_are_true(tmp_path, monkeypatch, everystep_command) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 10
    for varies, language, content in blocks:
        if language == "python":
            (tmp_path / "story.py").write_text(content, encoding="utf-8")
            run("story.py", tmp_path)
            continue
        for command in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
            line, _, shown = command.partition("\n")
            program, *arguments = shlex.split(line)
            assert program == "everystep"
            code, printed, err = everystep_command(*arguments)
            assert code in (0, 1), err  # 1: the answer is no
            if shown.endswith(REST):
                shown = shown.removesuffix(REST)
                printed = "".join(printed.splitlines(keepends=True)[: shown.count("\n")])
            printed = printed.replace("auto,STRICT", "AVX2,STRICT")  # as on AMD's processors
            if varies:
                printed, shown = (NUMBER.sub("#", text) for text in (printed, shown))
            assert_same_output(printed, shown)
