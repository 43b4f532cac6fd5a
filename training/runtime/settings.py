"""Settings of a command: YAML files, `key=value` overrides, and a --help that teaches.

Settings are flat. Each belongs to one group (a dataclass), and a name stands in one group only. The help
text of a setting is its field's metadata.
"""

import argparse
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from dataclasses import field

from training.runtime.setting_values import SettingsError, Word, convert, read_yaml


def setting(default, text: str):
    """A dataclass field with a help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def settings_of(config: type, *names: str) -> type:
    """Make a dataclass of settings from fields of a model's configuration: type, default and description."""
    specs = {spec.name: spec for spec in dataclasses.fields(config)}
    rows = []
    for name in names:
        default, hint = _default(specs[name]), specs[name].type
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [kind for kind in kinds if kind is not types.NoneType or default is None]
        # The parser makes lists, and floats of whole numbers.
        kinds = [kind for kind in kinds if typing.get_origin(kind) is not tuple]
        kinds = [kind for kind in kinds if kind is not int or float not in kinds]
        default = list(default) if isinstance(default, tuple) else default
        field_type = functools.reduce(operator.or_, kinds)
        rows.append((name, field_type, setting(default, specs[name].metadata["help"])))
    return dataclasses.make_dataclass(f"{config.__name__}Settings", rows)


def _default(spec: dataclasses.Field):
    """Return a field's default, made if it has a factory; MISSING if it has neither."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def one_of(settings, name: str, values: tuple[str, ...]) -> None:
    """Raise SettingsError unless the setting is one of the values."""
    value = getattr(settings, name)
    if value not in values:
        raise SettingsError(f"{name} must be one of {', '.join(values)}, got {value!r}")


def at_least(settings, low: float, *names: str) -> None:
    """Raise SettingsError unless every named setting is at least `low`, and finite."""
    for name in names:
        if not low <= getattr(settings, name) < math.inf:
            raise SettingsError(
                f"{name} must be at least {low} and finite, got {getattr(settings, name)}"
            )


def parse_settings(
    groups: dict[str, type], description: str, arguments: list[str] | None = None
) -> dict:
    """Read --config FILE and overrides (`key=value` or `--key value`).

    Args:
        groups: name to dataclass; the result has an instance under each name.
        arguments: command line, sys.argv by default.

    Raises:
        SettingsError: naming the setting that is unknown, or whose value is impossible.
    """
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE] [key=value | --key value ...]",
        epilog=_help(groups),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings, all at top level"
    )
    known, words = parser.parse_known_args(arguments)
    values = read_yaml(known.config) if known.config else {}
    return build_settings(groups, values | parse_overrides(words))


def build_settings(groups: dict[str, type], values: dict) -> dict:
    """Sort flat values into the groups, convert them to the fields' types and check them."""
    typed = convert_values(groups, values)
    built = {}
    for group, cls in groups.items():
        own = {f.name: typed[f.name] for f in dataclasses.fields(cls) if f.name in typed}
        built[group] = cls(**own)
        # No field: which settings somebody has chosen, as against defaults of the same value.
        built[group].given = frozenset(own)
    return built


def convert_values(groups: dict[str, type], values: dict) -> dict:
    """The same flat values, each of the type of its field.

    Raises:
        SettingsError: naming the setting that is unknown, or whose value is of another type.
    """
    hints = {name: hint for cls in groups.values() for name, hint in _hints(cls).items()}
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f": did you mean {close[0]!r}?" if close else "; --help lists all settings"
            raise SettingsError(f"unknown setting {str(name)!r}{hint}")
    return {str(name): convert(name, value, hints[name]) for name, value in values.items()}


def _hints(cls: type) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(cls)}


def parse_overrides(words: list[str]) -> dict:
    """`key=value`, `--key=value` and `--key value` to a dict; values wait for the type of their setting."""
    values, index = {}, 0
    while index < len(words):
        word = words[index]
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise SettingsError(
                    f"cannot read {word!r}: overrides are key=value or --key value, and values "
                    "with spaces in quotes"
                )
            following = words[index + 1] if index + 1 < len(words) else "--"
            # `--push-to-hub` alone switches on; a value that starts with -- or holds = needs `key=value`.
            if following.startswith("--") or re.match(r"\w+=", following):
                value = "true"
            else:
                index += 1
                value = following
        values[name.replace("-", "_")] = Word(value)
        index += 1
    return values


def _help(groups: dict[str, type]) -> str:
    lines = ["settings (in the YAML file, or as key=value on the command line):"]
    for cls in groups.values():
        lines += ["", f"  {(cls.__doc__ or cls.__name__).strip().splitlines()[0]}"]
        for spec in dataclasses.fields(cls):
            default = _default(spec)
            if default is dataclasses.MISSING:
                default = "required"
            text = spec.metadata.get("help", "")
            lines.append(f"    {spec.name:<28} {text} [{'null' if default is None else default}]")
    return "\n".join(lines)
