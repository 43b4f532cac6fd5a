"""Configuration of the SimVQ image tokenizer."""

from .configuration_checks import (
    MOST_LAYERS,
    Integers,
    at_least,
    at_most,
    check_parameters,
    described,
    in_groups,
    levels,
    strict_fields,
)
from .configuration_simvq_tokenizer import SimVQTokenizerConfig


@strict_fields
class SimVQImageConfig(SimVQTokenizerConfig):
    """Configuration of SimVQImageModel. The defaults are the published ImageNet 128 x 128 tokenizer.

    It has 64,281,987 parameters, downsamples by 8 and has 1,024 codes.
    """

    model_type = "simvq_image"

    in_channels: int = described(3, "channels of the images", at_least(1))
    base_channels: int = described(
        128, "channels of the first level, a multiple of norm_groups", at_least(1)
    )
    channel_multipliers: Integers = described(
        (1, 2, 2, 4),
        "width of each level in units of base_channels; the image is halved between levels",
        levels,
    )
    num_res_blocks: int = described(
        2, "residual blocks per level, and in the middle", at_least(1), at_most(MOST_LAYERS)
    )
    norm_groups: int = described(
        32,
        "groups of the GroupNorms; narrow models keep their colours with fewer, of 16 channels or more each",
        at_least(1),
    )
    norm_per_position: bool = described(
        False,
        "GroupNorms look at one position at a time, and not at the whole image: with few groups, so that small "
        "models keep colours at every size of image",
    )
    attention: bool = described(
        False,
        "self-attention at the lowest resolution, as in LlamaGen's VQGAN; the published models have none",
    )
    codebook_size: int = described(1024, "K, number of codes", at_least(1))
    codebook_dim: int = described(128, "d, width of a code", at_least(1))

    def validate_architecture(self):
        """Refuse sizes that would make too large a model, and channels that do not part into groups."""
        self.validate_quantizers()
        in_groups("base_channels", self.base_channels, self.norm_groups)
        if self.norm_per_position and self.base_channels == self.norm_groups:
            raise ValueError(
                f"norm_per_position with norm_groups={self.norm_groups} of {self.base_channels} channels: the "
                "norm of one value is zero: set fewer norm_groups"
            )
        widths = [self.base_channels * factor for factor in self.channel_multipliers]
        # Convolutions of 3 x 3: two in a block; one to the next level, and one back to four times the channels.
        blocks, between = 2 * self.num_res_blocks * 2 * 9, 9 + 4 * 9
        convolutions = sum((blocks + between) * width**2 for width in widths)
        if self.attention:
            # Four convolutions of 1 x 1, behind each block of the lowest level and between those of the middle.
            convolutions += 2 * (2 * self.num_res_blocks - 1) * 4 * widths[-1] ** 2
        ends = 9 * (2 * self.in_channels * widths[0] + self.codebook_dim * widths[-1])
        check_parameters(convolutions + ends + self.quantizer_parameters())

    @property
    def downsample_factor(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)
