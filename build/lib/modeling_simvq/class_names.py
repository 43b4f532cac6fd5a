"""Classes of a generator, by number or by name. The configurations are SimVQImageGenerationConfig."""

import difflib
import operator
from collections.abc import Iterable

from transformers import PreTrainedConfig

NAMES_SHOWN = 8


def class_labels(config: PreTrainedConfig, wanted) -> list[int]:
    """Labels of one wish or of several: strings, numbers, None, lists of these, arrays, tensors.

    Raises:
        ValueError: if there is no such class, or none is wanted.
    """
    if hasattr(wanted, "tolist"):  # numpy and torch
        wanted = wanted.tolist()
    single = isinstance(wanted, str) or not isinstance(wanted, Iterable)
    labels = [class_label(config, one) for one in ([wanted] if single else wanted)]
    if not labels:
        raise ValueError("classes is empty: name one, or None for no class in particular")
    return labels


def class_label(config: PreTrainedConfig, wanted) -> int:
    """Label of a class, from its number or name. Of "tench, Tinca tinca" each part is a name.

    Raises:
        ValueError: if there is no such class, or several have this name.
    """
    if wanted is None:
        return config.null_class
    if not isinstance(wanted, (str, bool)):
        try:
            label = operator.index(wanted)
        except (TypeError, RuntimeError, ValueError):
            raise ValueError(
                f"a class is a name or a whole number, got {wanted!r} of type {type(wanted).__name__}"
            ) from None
        if not 0 <= label <= config.null_class:
            raise ValueError(f"class {label} is not one of 0 to {config.num_classes - 1}")
        return label
    whole, parts = _names(config)
    name = str(wanted).strip().lower()
    found = whole.get(name) or parts.get(name) or []
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise ValueError(f"{wanted!r} is the name of classes {numbers}: give the number")
    if not found:
        raise ValueError(f"there is no class {wanted!r}{_hint(config, name, [*whole, *parts])}")
    return found[0]


def _names(config: PreTrainedConfig) -> tuple[dict, dict]:
    """Labels by whole name, and by part of a name."""
    whole, parts = {}, {}
    for label, name in config.id2label.items():
        whole.setdefault(name.strip().lower(), []).append(label)
        for part in {part.strip().lower() for part in name.split(",")}:
            parts.setdefault(part, []).append(label)
    return whole, parts


def _hint(config: PreTrainedConfig, wanted: str, known: list[str]) -> str:
    last = config.num_classes - 1
    if not config.num_classes:
        return ": this generator has no classes, only None"
    if all(name == f"LABEL_{label}" for label, name in config.id2label.items()):
        return f": the classes have no names here, give a number from 0 to {last}"
    names = [repr(config.id2label[label]) for label in range(config.num_classes)]
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    listed = f"there are {shown}" + (f" and {rest} more (0 to {last})" if rest > 0 else "")
    close = difflib.get_close_matches(wanted, known, n=1)
    return f": did you mean {close[0]!r}? ({listed})" if close else f": {listed}"
