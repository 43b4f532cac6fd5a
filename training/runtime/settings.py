"""Settings of a training run: YAML files, `key=value` overrides, and a --help that teaches.

Settings are flat. Each belongs to one group (a dataclass), and a name stands in one group only. The help
text of a setting is its field's metadata.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field

from training.runtime.setting_values import SettingsError, Word, convert, read_yaml


def setting(default, text: str):
    """A dataclass field with a help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class LoopSettings:
    """The run: how long, how fast, what is kept. Steps are optimiser steps of the model."""

    output_dir: str = setting(
        "runs/simvq", "folder of checkpoints, pictures, logs and the final model"
    )
    seed: int = setting(0, "seed of weights, data order and crops")
    batch_size: int = setting(64, "samples per process and forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step")
    mixed_precision: str = setting(
        "no", "no, bf16 or fp16; the code search is float32 in all of them"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    epochs: int = setting(50, "passes over the training set, unless max_steps ends the run before")
    max_steps: int | None = setting(None, "stop after this many steps (needed when streaming)")
    learning_rate: float = setting(1e-4, "peak rate of Adam, of all optimisers")
    adam_betas: list[float] = setting([0.5, 0.9], "Adam's betas, of all optimisers")
    weight_decay: float = setting(0.0, "AdamW's decay of matrices, not of norms and biases")
    lr_schedule: str = setting("constant", "constant or cosine, after the warm-up")
    warmup_steps: int = setting(0, "linear warm-up from 0; helps against NaN")
    min_learning_rate: float = setting(0.0, "floor of the cosine")
    max_grad_norm: float | None = setting(None, "clip the gradients' norm, of each optimiser")
    ema_decay: float = setting(0.999, "average of the weights, which is validated and published")
    log_every: int = setting(50, "steps between two lines of figures")
    validate_every: int = setting(
        1000, "steps between two validations; there is one at the end too"
    )
    save_every: int = setting(1000, "steps between two checkpoints; there is one at the end too")
    keep_checkpoints: int = setting(3, "checkpoints kept, the newest")
    resume: str | None = setting(None, "latest, or the path of a checkpoint")
    tracker: str = setting("tensorboard", "tensorboard, wandb, trackio or none")
    max_bad_steps: int = setting(20, "stop after this many non-finite steps in a row")
    push_to_hub: bool = setting(
        False, "publish the final model on the Hub, with its code and a card"
    )
    hub_model_id: str | None = setting(
        None, "name, or organisation/name, on the Hub; the name of output_dir by default"
    )
    hub_private: bool = setting(False, "publish to a private repository")
    hub_license: str | None = setting(
        None, "licence of the published weights, such as mit; null names none"
    )

    def __post_init__(self):
        one_of(self, "mixed_precision", ("no", "bf16", "fp16"))
        one_of(self, "lr_schedule", ("constant", "cosine"))
        one_of(self, "tracker", ("tensorboard", "wandb", "trackio", "none"))
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "epochs", "log_every")
        at_least(self, 1, "validate_every", "save_every", "keep_checkpoints", "max_bad_steps")
        at_least(self, 0, "warmup_steps", "min_learning_rate", "weight_decay")
        if self.max_steps is not None:
            at_least(self, 1, "max_steps")
        if not 0 < self.learning_rate < 1:
            raise SettingsError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise SettingsError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise SettingsError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise SettingsError(f"max_grad_norm must be positive or null, got {self.max_grad_norm}")


def one_of(settings, name: str, values: tuple[str, ...]) -> None:
    """Raise SettingsError unless the setting is one of the values."""
    value = getattr(settings, name)
    if value not in values:
        raise SettingsError(f"{name} must be one of {', '.join(values)}, got {value!r}")


def at_least(settings, low: float, *names: str) -> None:
    """Raise SettingsError unless every named setting is at least `low`."""
    for name in names:
        if not getattr(settings, name) >= low:
            raise SettingsError(f"{name} must be at least {low}, got {getattr(settings, name)}")


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
                raise SettingsError(f"cannot read {word!r}: overrides are key=value or --key value")
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
            missing = spec.default is dataclasses.MISSING
            default = (
                spec.default_factory()
                if missing and callable(spec.default_factory)
                else spec.default
            )
            if default is dataclasses.MISSING:
                default = "required"
            text = spec.metadata.get("help", "")
            lines.append(f"    {spec.name:<28} {text} [{'null' if default is None else default}]")
    return "\n".join(lines)
