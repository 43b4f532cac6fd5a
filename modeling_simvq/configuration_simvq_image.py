"""Configuration of the SimVQ image tokenizer."""

from transformers import PretrainedConfig

from .configuration_checks import (
    check_layers,
    check_parameters,
    codebook_parameters,
    number,
    refuse_misspelt,
    set_other_fields,
    whole_number,
)
from .quantizer_names import QUANTIZERS


class SimVQImageConfig(PretrainedConfig):
    """Sizes of a SimVQ image tokenizer. The defaults are the published ImageNet 128 x 128 model.

    With these defaults the model has 64,281,987 parameters, 8 x down-sampling and 1,024 codes.

    Args:
        in_channels: channels of the pictures.
        base_channels: channels of the first level, a multiple of 32 (GroupNorm has 32 groups).
        channel_multipliers: width of each level in units of base_channels. Between levels the picture is
            halved, so there are ``len(channel_multipliers) - 1`` halvings.
        num_res_blocks: residual blocks per level, and in the middle.
        codebook_size: K, number of codes.
        codebook_dim: d, channels of the latents.
        commitment_cost: beta of the paper's equation 7, weight of the encoder's side of the loss.
        quantizer: "simvq", or what the paper compares it with: "vq", "vq_ema", "fc", "fsq", "lfq", "lc"
            (see make_quantizer).
        quantizer_options: further arguments of the quantizer; of SimVQ basis_dim, basis_init,
            projection_hidden_dim, train_basis, train_projection, rotation_trick. None are the paper's method.

    Raises:
        ValueError: naming the field, if a value is impossible.
        TypeError: if a field's name is misspelt.
    """

    model_type = "simvq_image"

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        codebook_size: int = 1024,
        codebook_dim: int = 128,
        commitment_cost: float = 0.25,
        quantizer: str = "simvq",
        quantizer_options: dict | None = None,
        **kwargs,
    ):
        self.in_channels = whole_number("in_channels", in_channels)
        self.base_channels = whole_number("base_channels", base_channels)
        if not isinstance(channel_multipliers, (list, tuple)) or not channel_multipliers:
            raise ValueError(
                f"channel_multipliers must be a non-empty list, got {channel_multipliers!r}"
            )
        self.channel_multipliers = [
            whole_number("channel_multipliers", value) for value in channel_multipliers
        ]
        self.num_res_blocks = whole_number("num_res_blocks", num_res_blocks)
        self.codebook_size = whole_number("codebook_size", codebook_size)
        self.codebook_dim = whole_number("codebook_dim", codebook_dim)
        self.commitment_cost = number("commitment_cost", commitment_cost)
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        self.quantizer = quantizer
        if not isinstance(quantizer_options, (dict, type(None))):
            raise ValueError(f"quantizer_options must be a mapping, got {quantizer_options!r}")
        self.quantizer_options = dict(quantizer_options or {})
        if self.base_channels % 32:
            raise ValueError(
                f"base_channels must be a multiple of 32 (GroupNorm has 32 groups), got {base_channels}"
            )
        check_layers("num_res_blocks", self.num_res_blocks)
        if len(self.channel_multipliers) > 16:
            raise ValueError(
                f"channel_multipliers may have at most 16 levels, got {len(self.channel_multipliers)}"
            )
        check_parameters(self._about_parameters())
        refuse_misspelt(kwargs, known=list(vars(self)))
        set_other_fields(super().__init__, kwargs)

    def _about_parameters(self) -> int:
        widths = [self.base_channels * factor for factor in self.channel_multipliers]
        # Encoder and decoder: blocks of two 3 x 3 convolutions, and those between the levels.
        convolutions = sum((36 * self.num_res_blocks + 45) * width**2 for width in widths)
        ends = 9 * (2 * self.in_channels * widths[0] + self.codebook_dim * widths[-1])
        quantizer = codebook_parameters(
            self.codebook_size, self.codebook_dim, self.quantizer_options
        )
        return convolutions + ends + quantizer

    @property
    def downsample_factor(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return 2 ** (len(self.channel_multipliers) - 1)
