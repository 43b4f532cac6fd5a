"""Layout of the authors' image checkpoints, for convert_simvq_checkpoint."""

import re
from collections.abc import Callable

from .configuration_simvq_image import SimVQImageConfig
from .image_processing_simvq import SimVQImageProcessor
from .modeling_simvq_image import SimVQImageModel

NAME, MODEL = "image", SimVQImageModel
KEPT = ("encoder.", "decoder.", "quantize.")
DROPPED = ("loss.",)  # the discriminator and the perceptual network are not part of the tokenizer


def read_settings(arguments: dict) -> dict:
    """Read what tensors cannot tell from init_args of the authors' config.yaml."""
    return {"resolution": int(arguments["ddconfig"]["resolution"])}


def infer_config(shape: Callable, count: Callable, settings: dict, **quantizer) -> SimVQImageConfig:
    """Configuration from shape(name, dimensions) of tensors and count(pattern) of numbered modules."""
    levels = count(r"encoder\.down\.(\d+)\.")
    base_channels, in_channels = shape("encoder.conv_in.weight", 4)[:2]
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    return SimVQImageConfig(
        in_channels=in_channels,
        base_channels=base_channels,
        channel_multipliers=[width // base_channels for width in widths],
        num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        **quantizer,
    )


def rename(name: str, config: SimVQImageConfig) -> str:
    """Our name of an original tensor."""
    levels = len(config.channel_multipliers)
    name = re.sub(r"^quantize\.embedding\.weight$", "quantizer.basis", name)
    name = re.sub(r"^quantize\.embedding_proj\.", "quantizer.projection.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.levels.\1.", name)
    # The original numbers the decoder's levels from the highest resolution, we in the order they run.
    name = re.sub(
        r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.levels.{levels - 1 - int(m.group(1))}.", name
    )
    name = name.replace(".mid_block.", ".mid.").replace(".block.", ".blocks.")
    return name.replace(".nin_shortcut.", ".shortcut.").replace(
        ".upsample.conv1.", ".upsample.conv."
    )


def processor(config: SimVQImageConfig, settings: dict) -> SimVQImageProcessor:
    """The image processor for the resolution that the model was trained at."""
    side = settings.get("resolution", 128)
    return SimVQImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        size_divisor=config.downsample_factor,
    )
