"""Files for the user are complete, or what was there stays."""

import errno
import os
import stat
from pathlib import Path

import pytest

import everystep
from everystep.errors import UsageError
from everystep.views.output_file import write_file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recorded") / "run"
    return everystep.train_experiment("two-layer", {"steps": 3}, run=directory, progress=False)


@pytest.mark.parametrize(
    "command", ["plot RUN -o out.png", "table RUN -o out.html", "report RUN -o out.html",
                "losses RUN --csv -o out.csv", "losses RUN --parquet -o out.parquet"]
)  # fmt: skip
def test_what_was_there_stays_on_a_full_disk(command, run, everystep_command, monkeypatch, tmp_path):
    words = [str(run.directory) if word == "RUN" else word for word in command.split()]
    output = tmp_path / words[-1]
    assert everystep_command(*words[:-1], output)[0] == 0
    before = output.read_bytes()

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = everystep_command(*words[:-1], output)
    assert (code, "cannot be written: No space left on device" in err) == (1, True)
    assert output.read_bytes() == before
    assert not list(tmp_path.glob(".everystep.*"))


@pytest.mark.parametrize("command", ["plot", "table", "report"])
def test_without_a_name_only_an_earlier_output_is_replaced(command, run, everystep_command):
    code, out, err = everystep_command(command, run.directory)
    (path,) = Path().iterdir()
    assert (code, out) == (0, "") and path.name.startswith("run-") and err.startswith(f"{path} (")
    assert everystep_command(command, run.directory)[0] == 0
    path.write_text("mine")
    code, _, err = everystep_command(command, run.directory)
    assert (code, path.read_text()) == (2, "mine")
    assert f"{path} exists, and everystep did not write it; name another file: -o FILE" in err


def test_rights_stay_and_a_link_stays_a_link(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    path.chmod(0o640)
    write_file(path, "after")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("after", 0o640)
    link = tmp_path / "link.csv"
    link.symlink_to(path)
    write_file(link, b"through")
    assert link.is_symlink() and path.read_text() == "through"


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, "loss\n")
    assert os.read(reader, 100) == b"loss\n"
    os.close(reader)


def test_where_there_is_no_place_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"the directory .*nowhere does not exist"):
        write_file(tmp_path / "nowhere" / "out.csv", "")
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        write_file(tmp_path, "")
