"""The tutorial is correct: its code runs, and prints the shown output."""

from __future__ import annotations

import json
import math
import re
import runpy
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.training.swept import here

from everystep.numerics import Numerics

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
GOLDEN = Path(__file__).parent / "golden" / "two-layer.json"

END_OF_BLOCK = "<<end of block>>"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
#: Numbers with the blanks around them; the number of blanks depends on the number of digits.
PADDED_NUMBER = re.compile(rf" *{NUMBER.pattern} *")
#: Blanks within a line: a table's columns are as wide as the numbers in them.
GAP = re.compile(r"(?<=\S) +")


def blocks() -> list[tuple[str, str]]:
    """Return language and content of each fenced block, in order."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return fenced.findall(TUTORIAL.read_text(encoding="utf-8"))


def assert_same_output(printed: str, shown: str) -> None:
    """Text and whole numbers must be equal; other numbers may differ as processors do, on others."""
    context = f"printed:\n{printed}\nthe tutorial shows:\n{shown}"
    texts = [GAP.sub(" ", PADDED_NUMBER.sub("#", text)) for text in (printed, shown)]
    assert texts[0] == texts[1], context
    for got, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        whole = got.lstrip("+-").isdigit() and expected.lstrip("+-").isdigit()
        # A number shown with few digits may be rounded the other way: a unit of its last digit.
        mantissa, _, exponent = expected.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        near = math.isclose(float(got), float(expected), rel_tol=1e-3, abs_tol=1.01 * unit)
        is_exact = whole or shows_these_bits()
        assert got == expected if is_exact else near, f"{got} is not {expected}; {context}"


@cache
def shows_these_bits() -> bool:
    """Return whether the pages were written with this torch on such a processor, to the last digit."""
    made_with = json.loads(GOLDEN.read_text())["made_with"]
    here = Numerics.read(torch.device("cpu")).model_dump()
    return all(here[key] == value for key, value in made_with.items())


def test_python_prints_what_is_shown(tmp_path: Path, capfd) -> None:
    every = blocks()
    code = [content for language, content in every if language == "python"]
    ends = f"\nprint({END_OF_BLOCK!r})\n"
    script = tmp_path / "tutorial.py"
    script.write_text(ends.join([*code, ""]), encoding="utf-8")

    runpy.run_path(script.name, run_name="__main__")
    printed = capfd.readouterr().out.split(f"{END_OF_BLOCK}\n")[:-1]

    following = [after for (language, _), after in pairwise([*every, ("", "")]) if language == "python"]
    assert len(printed) == len(following)
    for got, (language, shown) in zip(printed, following, strict=True):
        assert_same_output(got, shown if language == "text" else "")

    for name in ("losses.html", "loss.png"):
        assert (tmp_path / name).stat().st_size > 0


#: What a reader of the README has already.
OWN = """
import everystep
import torch
from torch import nn

x, y = torch.randn(64, 10), torch.randn(64, 2)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
loss_function = nn.MSELoss()
optimizer = torch.optim.AdamW(model.parameters())
loader = [(x, y)] * 140
"""


@pytest.mark.parametrize(
    ("page", "before", "count"), [("README.md", OWN, 2), ("docs/reference.md", "", 2)]
)
def test_the_python_of_the_readme_and_of_the_reference_runs(page, before, count, tmp_path, monkeypatch):
    monkeypatch.setattr("everystep.replay.processes.pool", here)  # for the sweep
    text = (Path(__file__).parent.parent / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == count
    code = "\n".join([before, *blocks]).replace("range(8)", 'range(1), "steps": 2')  # of a sweep
    code = code.replace("steps=500", "steps=150").replace('"epochs": 5', '"epochs": 1')
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    runpy.run_path("page.py", run_name="__main__")
