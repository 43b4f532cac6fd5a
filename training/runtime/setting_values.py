"""Values of settings as people write them, in YAML files and on the command line.

YAML would guess what a value is: 1.10 and 0123456 numbers, 12:30 one to the base of 60, off a switch. A setting
that is a name would get another text than was written. Here values stay text until a setting's type is known.
"""

import contextlib
import re
import types
import typing
from collections.abc import Hashable
from pathlib import Path

import yaml

from training.runtime.errors import SettingsError

NULLS = ("", "~", "null", "Null", "NULL")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# As YAML 1.2 has them, with the underscores of Python; YAML 1.1 takes 1e-4 for text.
INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")


class Unread(str):
    """A value of a YAML file that is written without quotes."""


class Word(Unread):
    """A value of the command line, as it was typed."""


class _Loader(yaml.SafeLoader):
    """Leaves scalars as text, and refuses a key that stands twice."""

    yaml_implicit_resolvers: typing.ClassVar = {
        "<": [("tag:yaml.org,2002:merge", re.compile("<<"))],
    }

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key.value, Hashable)]
        for key in keys:
            if key != "<<" and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return Unread(node.value) if node.style is None else node.value


for tag in ("str", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{tag}", _text)


def read_yaml(path: str | Path) -> dict:
    """Settings of a YAML file, values still unread.

    Raises:
        SettingsError: if it cannot be read, is no YAML, or holds anything but `setting: value` lines.
    """
    try:
        values = yaml.load(Path(path).read_text(), _Loader)  # noqa: S506  (it is a SafeLoader)
    except OSError as error:
        raise SettingsError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {error}") from error
    if values is None or values in NULLS:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path} must hold `setting: value` lines, got a {type(values).__name__}"
        )
    return values


def read_word(word: str):
    """A word of the command line as YAML without its guesses: text, or a list or dict of such.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(word, _Loader)  # noqa: S506  (it is a SafeLoader)


def convert(name: str, value, hint):
    """A value as its setting's type has it.

    Args:
        name: of the setting.
        value: Unread, Word, or what a program gives.
        hint: the type, possibly one of several.

    Raises:
        SettingsError: if it is none of that type.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, Word):
        value = _read(name, value, options)
    if value is None or (isinstance(value, Unread) and value in NULLS):
        if type(None) in options:
            return None
        raise SettingsError(f"{name} must not be null")
    options = tuple(option for option in options if option is not type(None))
    if isinstance(value, Unread):
        for option in (bool, int, float, str):
            if option in options and (found := _parse(value, option)) is not None:
                return found
    else:
        for option in options:
            origin = typing.get_origin(option) or option
            if origin in (list, tuple) and isinstance(value, (list, tuple)):
                (inner,) = set(typing.get_args(option)) - {Ellipsis}
                return [convert(name, item, inner) for item in value]
            if origin is dict and isinstance(value, dict):
                return _resolve(value)
            if origin is bool and isinstance(value, bool):
                return value
            if origin is int and isinstance(value, int) and not isinstance(value, bool):
                return value
            if origin is str and isinstance(value, str):
                return value
            if origin is float and not isinstance(value, (bool, list, dict)):
                with contextlib.suppress(ValueError, OverflowError):
                    return float(value)
        if str in options and isinstance(value, bool):  # what YAML makes of mixed_precision: no
            return "yes" if value else "no"
        if str in options and isinstance(value, (int, float)):
            return str(value)
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise SettingsError(f"{name} must be {wanted}, got {value!r}")


def _read(name: str, word: Word, options: tuple):
    """A word: for a setting that is a text, literally; else as in a YAML file."""
    if word.startswith("!!"):  # a tag of YAML, which asks for an object: nobody means it as text
        raise SettingsError(f"{name}: {word!r} is not a valid value")
    only_text = all(option in (str, type(None)) for option in options)
    quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
    if (only_text and not quoted) or (str in options and not word.startswith(("[", "'", '"'))):
        return Unread(word)
    try:
        return read_word(word)
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{name}: {word!r} is not a valid value") from error


def _parse(text: str, kind: type):
    """Text as a value of a simple type; None if it is none."""
    if kind is bool:
        return SWITCHES.get(text.lower())
    if kind is int:
        return int(text.replace("_", "")) if INTEGER.fullmatch(text) else None
    if kind is float:
        with contextlib.suppress(ValueError):
            return float(text)
        return None
    return str(text)


def _resolve(value):
    """Read a value of unknown type: numbers and switches as such, all else as text."""
    if isinstance(value, dict):
        return {str(key): _resolve(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolve(item) for item in value]
    if not isinstance(value, Unread):
        return value
    if value in NULLS:
        return None
    found = (_parse(value, kind) for kind in (bool, int, float, str))
    return next(item for item in found if item is not None)
