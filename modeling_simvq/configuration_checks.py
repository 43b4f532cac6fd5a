"""Checks that the configurations share. Each error names the field and the value."""

import difflib
from collections.abc import Callable, Iterable

# What a file from elsewhere may declare: it must not fill the memory before its error comes.
# 40 GB of float32; the published tokenizers have up to 2 * 10^8.
MOST_PARAMETERS = 10**10
MOST_LAYERS = 1_000
# Of any number in quantizer_options.
MOST_OF_AN_OPTION = 1 << 16


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
    if not 0 <= value < 3e38:  # the largest float32
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return float(value)


def refuse_misspelt(kwargs: Iterable[str], known: list[str]) -> None:
    """Raise TypeError if a key looks like a known field: transformers would keep it and it would do nothing."""
    for key in kwargs:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            raise TypeError(
                f"unknown field {key!r} in the configuration: did you mean {close[0]!r}?"
            )


def refuse_unknown(what: str, given: Iterable[str], known: list[str]) -> None:
    """Raise TypeError, naming the argument, if one is given that is not known: it would do nothing."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{what} has no argument {key!r}{hint}")


def check_parameters(count: int) -> None:
    """Refuse a model of about so many parameters.

    Raises:
        ValueError: if they are more than MOST_PARAMETERS.
    """
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"the sizes in the configuration make a model of about {float(min(count, 10**300)):.1e} "
            f"parameters, more than {MOST_PARAMETERS:.0e}"
        )


def check_layers(name: str, count: int) -> None:
    """Refuse more than MOST_LAYERS of anything.

    Raises:
        ValueError: naming the field.
    """
    if count > MOST_LAYERS:
        raise ValueError(f"{name} must be at most {MOST_LAYERS}, got {count}")


def codebook_parameters(codebook_size: int, codebook_dim: int, options: dict) -> int:
    """About how many numbers a quantizer holds.

    Raises:
        ValueError: if codebook_size needs more than 32 bits a code, or an option is out of all proportion.
    """
    if codebook_size > 1 << 32:
        raise ValueError(f"codebook_size must be at most {1 << 32}, got {codebook_size}")
    widths = [codebook_dim]
    for name, value in options.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not abs(number) <= MOST_OF_AN_OPTION:
                raise ValueError(
                    f"quantizer_options: {name} must be at most {MOST_OF_AN_OPTION}, got {number}"
                )
            if isinstance(number, int):
                widths.append(abs(number))
    return codebook_size * max(widths) + codebook_dim * sum(widths)


def set_other_fields(init: Callable[..., None], fields: dict) -> None:
    """Hand the fields that are not ours to PreTrainedConfig; what it refuses becomes a ValueError."""
    try:
        init(**fields)
    except ValueError:
        raise
    except Exception as error:  # transformers checks types in several ways
        reason = " ".join(str(error).split())
        raise ValueError(f"impossible field in the configuration: {reason}") from error
