"""The fixtures' audio discriminators: names of the original's tensors, and small ones to test with."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.fixtures.recipe import value
from training.losses.audio_discriminators import AudioDiscriminator

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDER = FIXTURES / "losses_audio"
_RENAMES = (
    (r"^multi_period\.", "multiperioddisc.discriminators."),
    (r"^multi_resolution\.", "multiresddisc.discriminators."),
    (r"^dac\.", "dac.discriminators."),
    # The DAC's convolutions sit in a Sequential with their activation.
    (r"^(dac.*)\.layers\.(\d+)\.", r"\1.convs.\2.0."),
    (r"\.layers\.", ".convs."),
    (r"\.bands\.(\d+)\.(\d+)\.", r".band_convs.\1.\2.0."),
    (r"\.head\.", ".conv_post."),
    (r"parametrizations\.weight\.original0$", "weight_g"),
    (r"parametrizations\.weight\.original1$", "weight_v"),
)


def original_name(name: str) -> str:
    """Name in the original's loss of one of AudioDiscriminator's parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def small_discriminator() -> AudioDiscriminator:
    """The narrowed discriminator of the cases `small` and `small_div`."""
    discriminator = AudioDiscriminator(period_channels=1, resolution_channels=2, dac_channels=1)
    load_original(discriminator, load_file(FOLDER / "small_weights.safetensors"))
    return discriminator


def full_discriminator() -> AudioDiscriminator:
    """The published sizes, with weights that follow from their names."""
    shapes = {name: shape for name, shape, _ in json.loads((FOLDER / "full_keys.json").read_text())}
    discriminator = AudioDiscriminator()
    names = map(original_name, discriminator.state_dict())
    weights = {name: torch.from_numpy(value(name, tuple(shapes[name]))) for name in names}
    load_original(discriminator, weights)
    return discriminator


def narrowed_discriminator(weights: dict[str, Tensor]) -> AudioDiscriminator:
    """A discriminator whose layers are as wide as the given tensors, under the original's names."""
    discriminator = AudioDiscriminator()
    convolutions = [
        (name, conv) for name, conv in discriminator.named_modules() if isinstance(conv, nn.Conv2d)
    ]
    for name, conv in convolutions:
        direction = weights[original_name(f"{name}.parametrizations.weight.original1")]
        parent, _, place = name.rpartition(".")
        narrow = nn.Conv2d(
            direction.shape[1],
            direction.shape[0],
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        setattr(discriminator.get_submodule(parent), place, weight_norm(narrow))
    load_original(discriminator, weights)
    return discriminator


def load_original(discriminator: AudioDiscriminator, weights: dict[str, Tensor]) -> None:
    """Fill a discriminator with tensors under the original's names; others are left alone."""
    discriminator.load_state_dict(
        {name: weights[original_name(name)] for name in discriminator.state_dict()}
    )
