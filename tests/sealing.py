"""Makes a run that a test has altered on purpose look like a recording of these numbers."""

import shutil
from contextlib import closing

from everystep.recording.blocks import LOSS, series_of
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.files import row_of_file


def seal(directory):
    """Write the digests of the numbers and facts that a run has now; remove states of later steps."""
    with closing(Database.change(directory / FILE_NAME)) as database, database.transaction():
        database.connection.execute("DELETE FROM blocks")
        for name in (LOSS, *map(series_of, database.measurement_names())):
            steps, values = database.series(name)
            database.change_digests(name, dict(zip(steps.tolist(), values.tolist(), strict=True)))
        database.change_facts_digest()
        later = [row for row in database.snapshots() if row.step > database.newest_step()]
        database.remove_files(f"{row.directory}/*" for row in later)
    for row in later:
        shutil.rmtree(directory / row.directory)


def seal_files(directory):
    """Write the digests of the programs, data, changes and states that a run has now."""
    paths = [path for each in ("*.safetensors", "[pcs]*/**/*.*") for path in directory.glob(each)]
    names = [str(path.relative_to(directory)) for path in paths if path.is_file()]
    with closing(Database.change(directory / FILE_NAME)) as database, database.transaction():
        database.enter([row_of_file(name, (directory / name).read_bytes()) for name in names])
