"""Makes a run that a test has altered on purpose look like a recording of these numbers."""

import shutil
import sqlite3
from contextlib import closing

from everystep.recording.blocks import block_of, series_of
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.files import row_of_file


def seal(directory):
    """Write the digests of the numbers and facts that a run has now; remove states of later steps."""
    path = directory / FILE_NAME
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM blocks")
        steps = [step for (step,) in connection.execute("SELECT step FROM steps")]
        later = "FROM snapshots WHERE step > ?", [max(steps, default=0)]
        for (folder,) in connection.execute(f"SELECT directory {later[0]}", later[1]):
            shutil.rmtree(directory / folder)
        connection.execute(f"DELETE {later[0]}", later[1])
        measured = [*connection.execute("SELECT name, step FROM measurements")]
    database = Database.change(path)
    with database.transaction():
        database.open_blocks({("loss", block_of(step)) for step in steps})
        database.open_blocks({(series_of(name), block_of(step)) for name, step in measured})
        database.seal_blocks()
        database.seal_facts()
    database.close()


def seal_files(directory):
    """Write the digests of the programs, constants, data and changes that a run has now."""
    paths = [*directory.glob("*.safetensors"), *directory.glob("[pc][rh]*/*.*")]
    names = [str(path.relative_to(directory)) for path in paths if path.is_file()]
    with closing(Database.change(directory / FILE_NAME)) as database, database.transaction():
        database.write_files(row_of_file(name, (directory / name).read_bytes()) for name in names)
