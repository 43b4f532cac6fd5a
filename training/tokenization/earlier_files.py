"""Files of codes that an earlier run wrote: whether they fit the dataset as it is now, and what they lack."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets

from training.runtime.settings import SettingsError
from training.tokenization.code_files import (
    RowDigests,
    list_code_files,
    read_features,
    read_record,
    restate_features,
)


def check_length(count: int, there: dict[int, Path], size: int, folder: Path, split: str) -> None:
    """Raise SettingsError if a file of codes lies wholly behind the end of a split.

    Args:
        count: rows of the split now.
        there: files of codes by number.
        size: rows of a file.
    """
    if beyond := [path.name for index, path in there.items() if index * size >= count]:
        raise _other_state(folder, split, f"{split} has {count:,} rows, too few for {beyond[0]}")


def has_grown(
    open_rows: Callable[[], Iterator[dict]],
    number: int,
    path: Path,
    split: str,
    digests: RowDigests,
) -> bool:
    """Tell whether a file lacks rows of its portion that the source has gained since.

    Args:
        open_rows: gives the portion's rows, each time anew.
        number: of these rows.

    Raises:
        SettingsError: if the rows that the file was made of are not the first ones of the portion.
    """
    folder = path.parent.parent
    try:
        record = read_record(path)
    except ValueError as error:
        raise _other_state(folder, split, str(error)) from error
    if not digests.still_hold(lambda: islice(open_rows(), record.rows), record, path):
        raise _other_state(folder, split, f"the rows of {path.name} are no longer those of {split}")
    return number > record.rows


def check_columns(folder: Path, split: str, features: datasets.Features | None) -> None:
    """Check that the labels and other columns of the files of codes mean what they mean in the source now.

    Args:
        features: of a file of codes that would be written now; None if the source does not know its columns.

    Raises:
        SettingsError: if a column changed in any way but by classes behind the others.
    """
    if features is None:
        return
    for path in list_code_files(folder, split).values():
        try:
            changed = _changed_columns(read_features(path), _as_read(features))
        except ValueError as error:
            raise _other_state(folder, split, str(error)) from error
        if changed:
            raise _other_state(folder, split, f"{'; '.join(changed)}")


def name_classes(path: Path, features: datasets.Features | None) -> None:
    """Write a finished file again if there are more classes now: all files must name the same."""
    if features is not None and read_features(path) != _as_read(features):
        restate_features(path, features)


def _as_read(features: datasets.Features) -> datasets.Features:
    """Return columns as they come back from a file, where some types are told in other words."""
    return datasets.Features.from_arrow_schema(features.arrow_schema)


def _changed_columns(before: datasets.Features, now: datasets.Features) -> list[str]:
    """Return what differs between columns, in words; classes that were added behind the others do not."""
    return [
        f"column {name!r} {change}"
        for name in dict.fromkeys([*before, *now])
        if (change := _change(before.get(name), now.get(name)))
    ]


def _change(before, now) -> str:
    """Describe how a column differs; "" if earlier values mean the same now."""
    if isinstance(before, datasets.ClassLabel) and isinstance(now, datasets.ClassLabel):
        if now.names[: len(before.names)] == before.names:
            return ""
        return f"had the classes {_listed(before.names)} and has {_listed(now.names)}"
    if isinstance(before, dict) and isinstance(now, dict) and list(before) == list(now):
        return next((c for key in before if (c := _change(before[key], now[key]))), "")
    lists = isinstance(before, datasets.List) and isinstance(now, datasets.List)
    if lists and before.length == now.length:
        return _change(before.feature, now.feature)
    if before == now:
        return ""
    return f"was {_kind(before)} and is {_kind(now)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _kind(feature) -> str:
    return "not there" if feature is None else str(feature)


def _other_state(folder: Path, split: str, reason: str) -> SettingsError:
    return SettingsError(
        f"output: {folder} holds codes of another state of the dataset ({reason}). Rows may be added at the "
        "end; after any other change begin again: take another folder, or delete this one"
    )
