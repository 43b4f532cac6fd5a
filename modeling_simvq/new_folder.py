"""Folder that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Make a folder to write to; it, or what it holds, appears under its name when all has been written.

    Raises:
        ValueError: if there is a file of that name, or a folder with something in it.
    """
    output = Path(output)
    there = output.is_dir()
    if (output.exists() and not there) or (there and any(output.iterdir())):
        raise ValueError(f"{output} is there already and not an empty folder: choose another")
    if output.is_symlink() and not there:
        raise ValueError(f"{output} is a link to something that is not there: choose another")
    output.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there stays itself: it may be a link, a mounted disk or where the command runs.
    beside = output if there else output.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=".exporting-") as temporary:
        written = Path(temporary) / "written"
        written.mkdir()  # with the usual permissions, which a temporary folder does not have
        yield written
        if not there:
            os.replace(written, output)
            return
        for path in written.iterdir():
            os.replace(path, output / path.name)
