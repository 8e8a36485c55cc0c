import re
import shutil
import sqlite3
from xml.etree import ElementTree

import pytest
from tests.sealing import seal

from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import optimizers_text
from everystep.views.report import summary_html

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def summary_of(trained, tmp_path):
    """Return the summary of a copy of the run that has these losses."""

    def summarise(losses, name="changed", measured=(), reason=None):
        shutil.copytree(trained, tmp_path / name)
        database = sqlite3.connect(tmp_path / name / "run.sqlite")
        database.execute("DELETE FROM steps")
        database.executemany("INSERT INTO steps VALUES (?, ?)", enumerate(losses, 1))
        if losses:
            database.execute("UPDATE facts SET value = ? WHERE key = 'steps'", [str(len(losses))])
        else:
            database.execute("UPDATE facts SET value = ? WHERE key = 'status'", ['"stopped"'])
        database.executemany("INSERT INTO measurements VALUES (?, 1, 1.5)", [(one,) for one in measured])
        if reason:
            database.execute("INSERT OR REPLACE INTO facts VALUES ('reason', json_quote(?))", [reason])
        database.commit()
        database.close()
        seal(tmp_path / name)
        return summary_html(RecordedRun(tmp_path / name))

    return summarise


def picture(html):
    """Return the part of the summary that draws."""
    found = re.search("<svg.*?</svg>", html, re.DOTALL)
    return found[0] if found else None


def test_tells_the_run_in_a_few_lines(trained):
    run = RecordedRun(trained)
    html = summary_html(run)
    text = "".join(ElementTree.fromstring(html).itertext())
    update = optimizers_text(run.facts.training.optimizers)
    for shown in ("run", "finished", "MSELoss(reduction='sum')", update, "50"):
        assert shown in text
    assert len(html) < 10_000


def test_escapes_everything_and_has_no_script(summary_of):
    html = summary_of([2.0, 1.0], name=HOSTILE, measured=["<script>"], reason="<b>&")
    assert HOSTILE in "".join(ElementTree.fromstring(html).itertext())
    assert not re.search("<(img|script|b)[ >]", html)
    assert not re.search(r"<[^>]*\son[a-z]+=", html)


def test_a_run_without_a_step_has_no_picture(summary_of):
    html = summary_of([])
    assert "0 of 50" in html
    assert picture(html) is None


def test_the_axis_is_logarithmic_over_decades(summary_of):
    assert "log" in picture(summary_of([100.0, 10.0, 1.0], name="decades"))
    assert "log" not in picture(summary_of([99.0, 10.0, 1.0], name="less"))
    assert "log" not in picture(summary_of([100.0, 10.0, -1.0], name="negative"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "losses",
    [
        [None, None],
        [5.0],
        [5.0, 5.0, 5.0],
        [3.0, None, 2.0, float("inf"), 1.0, float("-inf")],
        [3e38, -3e38],
        [1e-45, 1e38],
    ],
)
def test_pictures_of_strange_losses_have_only_numbers_in_them(summary_of, losses):
    drawn = picture(summary_of(losses)) or ""
    numbers = re.findall(r'\b(?:d|points|cx|cy|x|y)="([^"]*)"', drawn)
    assert not re.search("nan|inf", " ".join(numbers))


def test_the_line_breaks_where_the_loss_is_not_finite(summary_of):
    whole = picture(summary_of([3.0, 2.0, 1.5, 1.0], name="whole"))
    broken = picture(summary_of([3.0, 2.0, None, 1.5, 1.0], name="broken"))
    assert whole.count("M") + whole.count("<polyline") < broken.count("M") + broken.count("<polyline")


def test_the_picture_of_a_long_run_is_small(summary_of):
    assert len(summary_of([1.0 + step % 7 for step in range(100_000)])) < 30_000
