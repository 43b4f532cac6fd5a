"""Packages that only some commands need: what to install where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Turn an ImportError into an error that names the package and the extra of this project that brings it.

    Args:
        what: needs the package, for the message.

    Raises:
        ValueError: if a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f'{what} needs {error.name}: pip install "modeling-simvq[{extra}]"'
        ) from error
