"""The token: the same for the user at every start, and nobody else's."""

import os
import stat
from pathlib import Path

import pytest

from everystep.errors import UsageError
from everystep.page.guard import token_of


def test_the_token_stays_the_same_and_belongs_to_the_directory(shelf, tmp_path, monkeypatch):
    token = token_of(shelf)
    assert len(token) >= 40
    monkeypatch.chdir(shelf)
    assert token_of(Path()) == token
    assert token_of(tmp_path) != token
    secret = Path(os.environ["XDG_STATE_HOME"]) / "everystep" / "page-secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_bytes().hex() not in token
    assert not [path for path in secret.parent.iterdir() if path.name.startswith("page-secret.")]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert token_of(shelf) != token
    broken = tmp_path / "another" / "everystep" / "page-secret"
    broken.write_bytes(b"short")
    assert token_of(shelf) == token_of(shelf)
    assert len(broken.read_bytes()) == 32


def known_to_others(path):
    path.chmod(0o644)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("spoil", [known_to_others, a_pipe, a_link])
def test_a_secret_that_others_may_know_is_made_anew(shelf, tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    token = token_of(shelf)
    secret = tmp_path / "state" / "everystep" / "page-secret"
    spoil(secret)
    assert token_of(shelf) != token
    assert stat.S_ISREG(secret.lstat().st_mode) and stat.S_IMODE(secret.lstat().st_mode) == 0o600
    assert token_of(shelf) == token_of(shelf)


def test_a_state_directory_that_cannot_be_used_is_named(shelf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="page-secret cannot be used"):
        token_of(shelf)
