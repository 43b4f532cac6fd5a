"""Checks that the configurations share. Each error names the field and the value."""

import difflib


def whole_number(name: str, value, low: int = 1) -> int:
    """The value, if it is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def truth(name: str, value) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def number(name: str, value) -> float:
    """The value as a float, if it is finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return float(value)


def refuse_misspelt(kwargs: dict, known: list[str]) -> None:
    """Raise TypeError if a key looks like a known field: transformers would keep it and it would do nothing."""
    for key in kwargs:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            raise TypeError(
                f"unknown field {key!r} in the configuration: did you mean {close[0]!r}?"
            )
