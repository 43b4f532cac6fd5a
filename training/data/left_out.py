"""Files that a dataset leaves out: counted and named, once."""

import logging

from accelerate.state import PartialState

logger = logging.getLogger(__name__)

NAMED = 5  # files in a message
_said: set[str] = set()


def say_left_out(config, files: list[str], why: str) -> None:
    """Count and name files that are not taken; once.

    Args:
        why: such as "not listed in metadata.csv".
    """
    if files:
        say_once(f"{config.dataset}: left out: {count_files(files)} ({list_files(files)}): {why}")


def say_once(text: str) -> None:
    """Log a warning once, and only in the main process."""
    main = not PartialState._shared_state or PartialState().is_main_process
    if main and text not in _said:
        _said.add(text)
        logger.warning(text)


def count_files(files: list[str]) -> str:
    """Return "1 file" or "1,000 files"."""
    return f"{len(files):,} file{'s' if len(files) > 1 else ''}"


def list_files(files: list[str]) -> str:
    """The first names, on one line whatever they hold."""
    names = [path if path.isprintable() else ascii(path) for path in files[:NAMED]]
    return ", ".join(names) + (", ..." if len(files) > NAMED else "")
