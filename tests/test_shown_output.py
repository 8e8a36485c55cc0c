"""The commands in README.md and in docs/ print what these pages show."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from tests.test_tutorial import GAP, NUMBER, PADDED_NUMBER, assert_same_output

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(<!-- numbers differ between processors -->\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
#: Stands for lines that a page leaves out.
OMITTED = re.compile(r"^\.\.\.\n", re.MULTILINE)


def assert_prints(printed: str, shown: str) -> None:
    """The lines shown must be printed in this order, with others only where the page has `...`."""
    lines = printed.splitlines(keepends=True)
    first, *others = OMITTED.split(shown)
    wanted = [first, *(part for part in others if part)]
    for index, part in enumerate(wanted):
        count = part.count("\n")
        begin = next((at for at in range(len(lines)) if begins_with(lines[at], part)), 0) if index else 0
        assert_same_output("".join(lines[begin : begin + count]), part)
        lines = lines[begin + count :]
    assert not lines or OMITTED.search(shown, len(shown) - 4), printed


def begins_with(line: str, part: str) -> bool:
    """Return whether this line is the first of the part, except for its numbers."""
    texts = [GAP.sub(" ", PADDED_NUMBER.sub("#", text)) for text in (line, part[: part.index("\n") + 1])]
    return texts[0] == texts[1]


@pytest.mark.parametrize(
    ("page", "languages", "count"),
    [
        ("docs/why.md", "python console", 10),
        ("README.md", "console", 5),
        ("docs/reference.md", "console", 1),
        ("docs/tutorial.md", "console", 2),
    ],
)
def test_the_commands_print_what_is_shown(page, languages, count, tmp_path, everystep_command) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    blocks = [block for block in blocks if block[1] in languages.split()]
    assert len(blocks) == count
    for varies, language, content in blocks:
        if language == "python":
            (tmp_path / "story.py").write_text(content, encoding="utf-8")
            runpy.run_path("story.py", run_name="__main__")
            continue
        for command in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
            line, _, shown = command.partition("\n")
            program, *arguments = shlex.split(line, comments=True)
            if program == "pip" or arguments == ["view"]:
                continue
            assert program == "everystep"
            code, printed, err = everystep_command(*arguments)
            assert code in (0, 1), err  # 1: the answer is no
            printed = printed.replace("AVX2,STRICT", "auto,STRICT")  # as on Intel's processors
            if varies:
                printed, shown = (NUMBER.sub("#", text) for text in (printed, shown))
            if shown:
                assert_prints(printed, shown)
