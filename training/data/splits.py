"""Splits as settings name them: whole ones, parts (train[:95%]) and several (a+b)."""

from collections.abc import Callable

import datasets

from training.data.files import Splits

Source = datasets.Dataset | datasets.IterableDataset


def asked_names(*splits: str | None) -> set[str]:
    """Names in settings such as train[:95%]+extra."""
    parts = {part for split in splits if split for part in (split, *split.split("+"))}
    return {part.partition("[")[0].strip() for part in parts} - {""}


def take_split(splits: Splits, wanted: str, load: Callable[[str], Source]) -> Source:
    """Resolve what a setting asks for: a split, a part of one (train[:95%]) or several (a+b).

    Args:
        load: opens a split by name.

    Raises:
        ValueError: if a split is not there.
    """
    whole = splits.find(wanted)
    if whole is not None:
        return load(whole)
    parts = []
    for part in wanted.split("+"):
        name, bracket, rest = part.strip().partition("[")
        found = splits.find(name)
        if found is None:
            known = ", ".join(map(repr, splits.files))
            note = f"; {splits.note}" if splits.note else ""
            raise ValueError(f"Unknown split {part.strip()!r}. It has {known}{note}.")
        parts.append(_part(load(found), bracket + rest, wanted))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _part(source: Source, part: str, wanted: str) -> Source:
    if not part:
        return source
    if isinstance(source, datasets.IterableDataset):
        raise ValueError(f"Bad split: {wanted}. A part needs a length: set streaming=false.")
    try:
        instruction = datasets.ReadInstruction.from_spec(f"train{part}")
        (taken,) = instruction.to_absolute({"train": len(source)})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"Bad split: {wanted} ({error}).") from None
    begin, end = taken.from_ or 0, len(source) if taken.to is None else taken.to
    return source.select(range(begin, end) if begin < end else [])
