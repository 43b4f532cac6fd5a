"""Errors that end a program with one line instead of a traceback."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Base of errors whose message is for the user: it names what is wrong and, where it can, the remedy."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with "error: ..." and exit status 1 where the user can mend what is wrong.

    Beside UserError these are the errors of libraries: values they refuse, files and addresses that cannot be
    read, packages that are not installed. With the log at DEBUG the traceback stays.
    """
    try:
        yield
    except (UserError, ValueError, OSError, ImportError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        sys.exit(error_line(error))


def error_line(error: Exception) -> str:
    """Return the line that a program ends with."""
    text = str(error)
    if text.startswith("Caught "):  # in a data loader's worker, which sends its traceback along
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return f"error: {text}"
