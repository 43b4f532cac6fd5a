"""Base of the configurations: huggingface_hub's strict dataclasses, with bounds, help and plain errors."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from typing import get_args

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from transformers import PreTrainedConfig

# What a file from elsewhere may declare: it must not fill the memory before its error comes.
# 40 GB of float32; the published tokenizers have up to 2 * 10^8.
MOST_PARAMETERS = 10**10
MOST_LAYERS = 1_000
MOST_LEVELS = 16
# Of any number in quantizer_options.
MOST_OF_AN_OPTION = 1 << 16
LARGEST_FLOAT32 = 3e38

# Types of fields. JSON writes 1.0 as 1, and tuples as lists; configurations hold floats and lists.
Number = float | int
Integers = list[int] | tuple[int, ...]


def described(default, text: str, *checks: Callable[[object], None]):
    """Return a configuration's field with its help, and checks of values that have its type.

    Trainers offer most fields as settings, with the same default and help.
    """
    metadata = {"help": text, "validator": list(checks)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# transformers' own `interval` is no bound at min=0 in 5.6.
def at_least(low: int) -> Callable[[int | None], None]:
    """Return a check of a field: an integer from `low` upwards, or None where its type has that."""

    def check(value: int | None) -> None:
        if value is not None and value < low:
            raise ValueError(f"must be at least {low}, got {value}")

    return check


def at_most(high: int) -> Callable[[int], None]:
    """Return a check of a field: an integer up to `high`."""

    def check(value: int) -> None:
        if value > high:
            raise ValueError(f"must be at most {high}, got {value}")

    return check


def not_negative(value: float) -> None:
    """Check a field: a finite number of at least 0."""
    if not 0 <= value < LARGEST_FLOAT32:
        raise ValueError(f"must be finite and >= 0, got {value}")


def probability(value: float) -> None:
    """Check a field: at least 0 and below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"must lie in [0, 1), got {value}")


def in_groups(name: str, channels: int, groups: int) -> None:
    """Refuse channels that GroupNorm cannot part.

    Raises:
        ValueError: naming the field.
    """
    if channels % groups:
        raise ValueError(f"{name} must be a multiple of {groups} (norm_groups), got {channels}")


def levels(values: list[int]) -> None:
    """Check a field: positive integers, one for each level of a network."""
    if not values or min(values) < 1:
        raise ValueError(f"must be a non-empty list of integers of at least 1, got {values}")
    if len(values) > MOST_LEVELS:
        raise ValueError(f"may have at most {MOST_LEVELS} values, got {len(values)}")


def pair(values: list[int] | None) -> None:
    """Check a field: two positive integers, or None where its type has that."""
    if values is not None and (len(values) != 2 or min(values) < 1):
        raise ValueError(f"must be two integers of at least 1, got {values}")


def strict_fields(cls: type) -> type:
    """Apply huggingface_hub's `strict` to a configuration.

    Fields are checked whenever they are set, and `validate_architecture` checks them together. Errors are
    ValueErrors that name the field and the value. The fields' help becomes part of the class's docstring.
    """
    cls = strict(cls)
    set_checked, validate = cls.__setattr__, cls.validate

    def __setattr__(self, name: str, value) -> None:
        try:
            set_checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            reason = error.__cause__
            if isinstance(reason, TypeError):
                wanted = cls.__dataclass_fields__[name].type
                wanted = wanted.__name__ if isinstance(wanted, type) else wanted
                reason = f"must be {wanted}, got {value!r}"
            raise ValueError(f"{name} {reason}") from None

    def checked_validate(self) -> None:
        """Check the fields together."""
        try:
            validate(self)
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None

    checked_validate.__is_defined_by_strict_decorator__ = True  # strict replaces it in subclasses
    cls.__setattr__, cls.validate = __setattr__, checked_validate
    helps = [f"    {f.name}: {f.metadata['help']}" for f in own_fields(cls)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *helps])
    return cls


def own_fields(cls: type) -> list[Field]:
    """Return the fields of a configuration that are not PreTrainedConfig's."""
    shared = {spec.name for spec in fields(PreTrainedConfig)}
    return [spec for spec in fields(cls) if spec.name not in shared]


class CheckedConfig(PreTrainedConfig):
    """Base of the configurations. Their fields are `described`, and each class is decorated by `strict_fields`.

    Raises:
        ValueError: naming the field, if a value is impossible.
        TypeError: if a field's name is misspelt.
    """

    def __post_init__(self, **kwargs):
        own = own_fields(type(self))
        refuse_misspelt(kwargs, known=[spec.name for spec in own])
        for spec in own:
            value = getattr(self, spec.name)
            if isinstance(value, (list, tuple)):
                setattr(self, spec.name, list(value))
            elif isinstance(value, dict):  # the caller keeps its own
                setattr(self, spec.name, dict(value))
            elif isinstance(value, int) and float in get_args(spec.type):
                setattr(self, spec.name, float(value))
        try:
            super().__post_init__(**kwargs)
        except ValueError:
            raise
        except Exception as error:  # transformers checks its own fields in several ways
            reason = " ".join(str(error).split())
            raise ValueError(f"impossible field in the configuration: {reason}") from error


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
