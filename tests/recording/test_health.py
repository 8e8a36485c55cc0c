"""Missing or altered numbers of a run are reported wherever they are shown."""

import json
import shutil
import warnings
from contextlib import suppress

import pytest
from tests.page.serving import Application
from tests.sealing import sql

import everystep
from everystep.errors import DamageWarning
from everystep.recording.database import Database

ALTERED = {
    "a loss": "UPDATE steps SET loss = loss * 1.0000001 WHERE step = 7",
    "a measurement": "UPDATE measurements SET value = value / 2 WHERE step = 10",
    "a fact": "UPDATE facts SET value = replace(value, '0.01', '0.02') WHERE key = 'optimizers'",
    "a missing digest": "DELETE FROM blocks WHERE name = 'facts'",
    "a missing file": "DELETE FROM files WHERE name GLOB 'snapshots/000020/*'",
    "all values": "DELETE FROM measurements",
    "a name": "UPDATE measurements SET name = name || '!' WHERE step = 10",
    "a last step": "DELETE FROM steps WHERE step = 20",
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 20 steps with a measurement that no test may change; it was stopped before its end."""
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("recorded") / "run"
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 2)
    everystep.train(
        model, (torch.randn(20, 4), torch.randn(20, 2)), loss=torch.nn.MSELoss(), steps=20,
        optimizer=everystep.GradientDescent(model.parameters(), lr=0.01), validation=0.2,
        evaluate_every=5, run=directory, progress=False,
    )  # fmt: skip
    sql(directory, "PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


@pytest.fixture(params=ALTERED)
def altered(request, recorded, tmp_path):
    run = shutil.copytree(recorded, tmp_path / "run")
    if request.param == "a last step":  # as if it had been stopped, by the user, at step 20 of 30
        sql(run, "UPDATE facts SET value = '\"stopped\"' WHERE key = 'status'")
    assert sql(run, ALTERED[request.param], "SELECT changes()") != [(0,)]
    return run


def test_a_run_as_it_was_recorded_is_not_called_damaged(recorded, everystep_command):
    run = everystep.open(recorded)
    assert run.findings() == [] and run.damage is None
    assert run.verify(progress=False).is_exact
    assert len(run.losses) == 20
    code, out, err = everystep_command("losses", recorded)
    assert (code, err) == (0, "") and len(out.splitlines()) == 21


@pytest.mark.sweep(every=3)
def test_altered_numbers_are_said_by_each_command(altered, everystep_command, tmp_path):
    for command in (
        ("losses", altered),
        ("losses", altered, "--json"),
        ("losses", altered, "--last", 2),
        ("table", altered, "-o", tmp_path / "table.html"),
        ("plot", altered, "-o", tmp_path / "plot.svg"),
        ("report", altered, "-o", tmp_path / "report.html"),
    ):
        code, out, err = everystep_command(*command)
        assert code == 1
        assert err.count("run is damaged: run.sqlite") == 1
        assert "run everystep doctor run for details" in err
        if "--json" in command:
            assert json.loads(out)
    for page in ("table.html", "report.html"):
        assert "run is damaged: run.sqlite" in (tmp_path / page).read_text()
    code, out, _ = everystep_command("verify", altered)
    assert code == 1 and "problem     run.sqlite" in out


def test_altered_losses_are_said_in_python(altered):
    with pytest.warns(DamageWarning, match="run is damaged: run.sqlite"):
        run = everystep.open(altered)
        assert len(run.losses) >= 19
    assert "damaged" in run.table(rows=100).caption()
    assert "damaged" in run.plot().labels.caption
    assert "is damaged" in run._repr_html_()
    assert not run.verify(progress=False).is_exact


@pytest.mark.sweep(every=2)
def test_what_is_written_later_does_not_make_altered_numbers_recorded_ones(altered, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        run = everystep.open(altered)
        run.note = "looked at"
        run.measure("loss", name="again", progress=False)
        assert run.damage
        with suppress(everystep.RunError):  # where the altered number is compared with a replay
            assert run.fork(15, steps=17, run=tmp_path / "fork", progress=False).damage
            run.resume(steps=22, progress=False)
        assert everystep.open(altered).damage


@pytest.mark.parametrize("altered", ["a loss"], indirect=True)
def test_an_altered_loss_is_said_by_a_question_about_losses(altered):
    with pytest.warns(DamageWarning, match="run is damaged: run.sqlite, steps: "):
        everystep.open(altered).when("loss < 1")


@pytest.mark.parametrize("altered", ["a missing file", "all values"], indirect=True)
def test_what_is_gone_as_a_whole_is_said_where_a_step_is_opened(altered):
    with pytest.warns(DamageWarning, match=r"run is damaged: run.sqlite, (files|measurements): "):
        everystep.open(altered)[7]


def test_a_bit_in_the_name_of_a_measurement_is_reported(recorded, tmp_path, everystep_command):
    whole = (recorded / "run.sqlite").read_bytes()
    expected = everystep.open(recorded).measurements
    run, name = shutil.copytree(recorded, tmp_path / "run"), b"validation_loss"
    place = whole.index(name)
    silent = []
    while place >= 0:
        for byte in (0, 4, len(name) - 1):
            for bit in range(8):
                content = bytearray(whole)
                content[place + byte] ^= 1 << bit
                (run / "run.sqlite").write_bytes(content)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", DamageWarning)
                    with suppress(everystep.RunError):
                        found = everystep.open(run).measurements
                        if not caught and not found.equals(expected):
                            silent.append((place, byte, bit))
        place = whole.find(name, place + 1)
    assert not silent
    (run / "run.sqlite").write_bytes(whole.replace(name, b"validation_lost", 1))
    for command in (
        ["losses", run],
        ["verify", run],
        ["doctor", run],
        ["when", run, "validation_loss > 9"],
    ):
        code, out, err = everystep_command(*command)
        assert code == 1 and "values of validation_loss of steps 1 to 20 do not match" in out + err


def test_a_bit_in_the_schema_is_reported(recorded, tmp_path, everystep_command):
    run = shutil.copytree(recorded, tmp_path / "run")
    whole = (run / "run.sqlite").read_bytes()
    begin = whole.index(b"CREATE TABLE blocks")
    for place in range(begin, begin + 60, 3):
        content = bytearray(whole)
        content[place] ^= 0x80
        (run / "run.sqlite").write_bytes(content)
        with pytest.raises(everystep.RunError, match=r"run\.sqlite"):
            everystep.open(run)
    code, _, err = everystep_command("losses", run)
    assert code and "run.sqlite" in err


def test_the_list_of_runs_says_which_are_damaged(recorded, tmp_path, everystep_command):
    for name in ("whole", "shortened", "described"):
        shutil.copytree(recorded, tmp_path / "runs" / name)
    for name, statement in (
        ("shortened", "UPDATE facts SET value = '\"stopped\"' WHERE key = 'status'"),
        ("shortened", "DELETE FROM steps WHERE step > 10"),
        ("described", "UPDATE facts SET value = '3' WHERE key = 'seed'"),
    ):
        sql(tmp_path / "runs" / name, statement)
    code, out, err = everystep_command("runs")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "damaged" in lines["shortened"] and "damaged" in lines["described"]
    assert "damaged" not in lines["whole"]
    assert "steps 11 to 20 are missing" in err
    listed = json.loads(everystep_command("runs", tmp_path / "runs", "--json")[1])
    assert listed == Application(tmp_path / "runs").json("/api/runs")["runs"]
    damages = {each["name"]: each["damage"] for each in listed}
    assert damages["whole"] is None and "shortened is damaged: run.sqlite" in damages["shortened"]
    _, out, _ = everystep_command("runs", "--json")
    assert [run["damage"] is None for run in json.loads(out)] == [False, False, True]


@pytest.mark.parametrize("part", ["header", "middle"])
def test_a_killed_run_with_a_damaged_log_has_the_steps_that_sqlite_reads(
    part, tmp_path, everystep_command
):
    settings = {"steps": 20, "data.N": 4, "data.D_in": 2, "data.D_out": 1}
    settings |= {"model.layers": ["Linear(2, 1)"]}
    run, close = tmp_path / "run", Database.close

    def copy_and_close(database):  # with all that was recorded in the log
        shutil.copytree("original", run, ignore=shutil.ignore_patterns("*-shm", "*.spare"))
        close(database)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "close", copy_and_close)
        original = everystep.train_experiment("two-layer", settings, run="./original", progress=False)
    log = run / "run.sqlite-wal"
    content = bytearray(log.read_bytes())
    content[20 if part == "header" else len(content) // 2] ^= 4
    log.write_bytes(content)
    other = shutil.copytree(run, tmp_path / "other")
    expected = sql(other, "SELECT step, loss FROM steps ORDER BY step")
    assert len(expected) < 20
    commands = [
        ["losses"], ["losses", "--json"], ["table", "-o", "t.html"], ["plot", "-o", "p.svg"],
        ["report", "-o", "r.html"], ["step", "17"], ["verify"], ["doctor"], ["when", "loss > 1e9"],
        ["measure", "loss + 1"], ["why", "17", "loss"], ["rows", "17"],
        ["rerun", "--precision", "float64"],
        ["fork", "--at", "17", "--run", "./fork", "-q"], ["diff", "original"], ["resume", "-q"],
    ]  # fmt: skip
    for number, command in enumerate(commands[part == "middle" :: 2]):
        copy = shutil.copytree(run, tmp_path / str(number) / "run")
        code, out, err = everystep_command(command[0], copy, *command[1:])
        assert code in (1, 2) and "run.sqlite" in out + err, command
    with pytest.warns(DamageWarning, match=r"run is damaged: run\.sqlite, steps: steps \d+ to 20 are"):
        opened = everystep.open(run)
    assert opened.losses.rows() == expected
    assert original.losses.rows()[: len(expected)] == expected
