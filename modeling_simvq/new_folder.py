"""Folder that appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Make a folder to write to, which appears under its name when all has been written, and not before.

    Raises:
        ValueError: if there is a file of that name, or a folder with something in it.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already and not an empty folder: choose another")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".exporting-") as temporary:
        written = Path(temporary) / "written"
        written.mkdir()  # with the usual permissions, which a temporary folder does not have
        yield written
        os.replace(written, output)
