"""Inputs and outputs of a command: files, folders, patterns and pipes."""

import glob
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PIPE = "-"


@dataclass(frozen=True)
class Job:
    """One file to make of one file; None is a pipe."""

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        """The source, for messages."""
        return "standard input" if self.source is None else str(self.source)

    def is_done(self) -> bool:
        """Tell whether the target is there and not older than the source."""
        if self.source is None or self.target is None or not self.target.exists():
            return False
        return self.target.stat().st_mtime_ns >= self.source.stat().st_mtime_ns

    def read(self) -> bytes:
        """Return the content of the source.

        Raises:
            OSError: if it cannot be read.
        """
        return sys.stdin.buffer.read() if self.source is None else self.source.read_bytes()

    def write(self, content: bytes) -> None:
        """Write the target, whole or not at all."""
        if self.target is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        part = self.target.with_name(f".{self.target.name}.{os.getpid()}.part")
        try:
            part.write_bytes(content)
            part.replace(self.target)
        finally:
            part.unlink(missing_ok=True)


def jobs_of(inputs: Iterable[str], output: str, suffixes: Iterable[str], made: str) -> list[Job]:
    """Find the files that are meant and where what is made of each goes.

    A folder's files keep their places below the output; of files that are named, only the names are kept.

    Args:
        inputs: files, folders, patterns, or "-" for standard input.
        output: a folder, or "-" for standard output.
        suffixes: of the files that are taken from folders, lower case.
        made: suffix of what is made.

    Raises:
        ValueError: if an input is not there, nothing is found, or two outputs would be the same file.
    """
    suffixes, found = tuple(suffixes), []
    for text in inputs:
        if text == PIPE:
            found.append((None, Path("stdin")))
            continue
        path = Path(text)
        paths = (
            [path]
            if path.exists()
            else [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        )
        if not paths:
            raise ValueError(f"there is no file or folder {text}")
        for path in paths:
            if path.is_dir():
                found += [(file, file.relative_to(path)) for file in _files_in(path, suffixes)]
            else:
                found.append((path, Path(path.name)))
    if not found:
        raise ValueError(
            f"no files to take in {', '.join(inputs)}: they end in {', '.join(suffixes)}"
        )
    if output == PIPE:
        if len(found) > 1:
            raise ValueError(f"standard output takes one file, and there are {len(found)}")
        return [Job(found[0][0], None)]
    jobs, taken = [], {}
    for source, place in found:
        job = Job(source, Path(output) / place.with_suffix(made))
        if job.target in taken and taken[job.target].source != source:
            raise ValueError(
                f"{taken[job.target].name} and {job.name} would both become {job.target}: "
                "rename one, or give them to two commands"
            )
        if job.target not in taken:
            taken[job.target] = job
            jobs.append(job)
    return jobs


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = (path for path in folder.rglob("*") if not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in suffixes and path.is_file())
