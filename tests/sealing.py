"""Alters a run's database on purpose, or makes an altered run look like a recording of its numbers."""

import sqlite3
from contextlib import closing
from pathlib import Path

from everystep.recording.blocks import LOSS, TABLES, series_of
from everystep.recording.database import FILE_NAME, Database, Repeat
from everystep.recording.files import row_of_file


def sql(directory, *statements):
    """Change the database of a run; return the rows of the last statement.

    A statement is a text, or has arguments; a list of them is for many times.
    """
    found = []
    with closing(sqlite3.connect(Path(directory, FILE_NAME))) as database, database:
        for statement in statements:
            text, *given = (statement,) if isinstance(statement, str) else statement
            run = database.executemany if given and isinstance(given[0], list) else database.execute
            found = run(text, *given).fetchall()
    return found


def seal(directory):
    """Write the digests of the numbers and facts that a run has now; remove states of later steps."""
    with closing(Database.change(directory / FILE_NAME)) as database:
        later = [row.directory for row in database.snapshots() if row.step > database.newest_step()]
        with database.removing(later):
            _seal_numbers(database)


def _seal_numbers(database):
    database.connection.execute("DELETE FROM blocks")
    for name in (LOSS, *map(series_of, database.measurement_names())):
        steps, values = database.series(name)
        database.change_digests(name, dict(zip(steps.tolist(), values.tolist(), strict=True)))
    _seal_tables(database)


def _seal_tables(database):
    for table in TABLES:
        database.connection.execute("DELETE FROM blocks WHERE name = ?", (table,))
        database.change_table(table, database.connection.execute(f"SELECT * FROM {table}").fetchall())


def seal_tables(directory):
    """Write the digests of the facts and of the list of files that a run has now."""
    with closing(Database.change(Path(directory, FILE_NAME))) as database:
        _seal_tables(database)


def seal_repeats(directory):
    """Write the digests of what repeats the steps of a run now."""
    rows = sql(directory, "SELECT step, program, numbers, inputs, count FROM repeats")
    digests = [(Repeat(*row).digest, row[0]) for row in rows]
    sql(directory, ("UPDATE repeats SET digest = ? WHERE step = ?", digests))


def seal_files(directory):
    """Write the digests of the programs, data, changes and states that a run has now."""
    paths = [path for each in ("*.safetensors", "[pcs]*/**/*.*") for path in directory.glob(each)]
    names = [str(path.relative_to(directory)) for path in paths if path.is_file()]
    with closing(Database.change(directory / FILE_NAME)) as database, database.transaction():
        database.enter([row_of_file(name, (directory / name).read_bytes()) for name in names])
