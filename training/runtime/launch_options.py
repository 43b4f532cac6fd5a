"""Options of the launch: what `accelerate launch` and its configuration files say through the environment.

Accelerate takes some of it over the program's own values and ignores the rest. Here it is either a setting's
value or refused by name.
"""

import os
from dataclasses import MISSING, fields

from accelerate.utils import DynamoBackend

from training.runtime.settings import SettingsError

# Variable of a launch, its option, and the setting of the trainers that means the same.
SAME = (
    ("ACCELERATE_MIXED_PRECISION", "--mixed_precision", "mixed_precision"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "--gradient_accumulation_steps",
        "gradient_accumulation_steps",
    ),
    ("ACCELERATE_GRADIENT_CLIPPING", "--gradient_clipping", "max_grad_norm"),
)
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
# What launchers write for options that nobody gave.
UNSAID = {"mixed_precision": ("no",), "max_grad_norm": ("none", "auto", "null")}
# Ways of training that the loop does not know, and what to take instead.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_megatron_lm"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "tensor, context or sequence parallelism",
        "--use_parallelism_config",
    ),
}


def follow_launch(settings) -> None:
    """Take what the launch says into settings that were left at their defaults.

    Args:
        settings: a dataclass with the settings of SAME, those of the loop.

    Raises:
        SettingsError: if launch and settings disagree, or the launch asks for what is not done here.
    """
    refuse_engines()
    compiler()  # which Accelerate reads by itself
    given = getattr(settings, "given", None) or _not_default(settings)
    for variable, option, name in SAME:
        said = _said(variable, name)
        if said is None:
            continue
        value, ours = _value(variable, name, said), getattr(settings, name)
        if value == ours:
            continue
        if name in given:
            raise SettingsError(
                f"{name} is {'null' if ours is None else ours}, but the launch says {said} ({option}, "
                f"{variable}={os.environ[variable]}): leave it out of the launch, or set {name}={said}"
            )
        setattr(settings, name, value)


def refuse_half_precision() -> None:
    """Refuse other precisions, for the commands that do not train: half precision gives other codes.

    Raises:
        SettingsError: if the launch asks for another precision, or an engine of training.
    """
    refuse_engines()
    refuse_compiler("this command")
    variable, option, name = SAME[0]
    said = _said(variable, name)
    if said is not None:
        raise SettingsError(
            f"the launch says {option} {said} ({variable}), and this command works in float32, because half "
            f"precision gives other codes: launch it with {option} no"
        )


def refuse_engines() -> None:
    """Raise SettingsError if the launch asks for an engine that nothing here works with."""
    for variable, (name, option) in ENGINES.items():
        if os.environ.get(variable, "").strip().lower() in ("true", "1", "yes", "y", "on", "t"):
            raise SettingsError(
                f"the launch asks for {name} ({option}, {variable}), which nothing here works with: take "
                "training/configs/accelerate/eight_gpus.yaml, or fsdp.yaml for a large generator"
            )


def compiler() -> str | None:
    """Return the backend of torch.compile that the launch asks for, lower case; None for no compiling.

    Raises:
        SettingsError: if Accelerate knows no such backend.
    """
    backend = os.environ.get(DYNAMO, "no").strip().lower()
    if backend in ("", "no", "none"):
        return None
    known = [known.value.lower() for known in DynamoBackend if known is not DynamoBackend.NO]
    if backend not in known:
        raise SettingsError(
            f"the launch says --dynamo_backend {backend} ({DYNAMO}), and the backends are {', '.join(known)}: "
            "take inductor, or no to compile nothing"
        )
    return backend


def refuse_compiler(who: str) -> None:
    """Raise SettingsError if the launch asks for torch.compile.

    Args:
        who: compiles nothing.
    """
    if (backend := compiler()) is not None:
        raise SettingsError(
            f"the launch says --dynamo_backend {backend} ({DYNAMO}), and {who} compiles nothing: launch it "
            "with --dynamo_backend no, and take dynamo_config out of the launch's configuration file"
        )


def _said(variable: str, name: str) -> str | None:
    """Return what the launch says; None if it says nothing."""
    said = os.environ.get(variable, "").strip().lower()
    return None if said in ("", *UNSAID.get(name, ())) else said


def _value(variable: str, name: str, said: str):
    """Convert to the setting's type."""
    try:
        if name == "gradient_accumulation_steps":
            value = int(said)
        elif name == "max_grad_norm":
            value = float(said)
        else:
            value = said if said in ("bf16", "fp16") else None
    except ValueError:
        value = None
    if value is None or (not isinstance(value, str) and not value > 0):
        allowed = "no, bf16 or fp16" if name == "mixed_precision" else "a positive number"
        raise SettingsError(f"the launch says {variable}={said}: {name} can be {allowed}")
    return value


def _not_default(settings) -> set[str]:
    """Settings that differ from their defaults, where nobody kept which were given."""
    return {
        spec.name
        for spec in fields(settings)
        if spec.default is not MISSING and getattr(settings, spec.name) != spec.default
    }
