"""SimVQ image tokenizer: convolutional encoder, SimVQ quantizer, convolutional decoder.

The architecture is the attention-free VQGAN of the SimVQ authors (arXiv 2411.02038, section 5; parity is
tested against outputs of their code, tests/fixtures/image_*). `attention` adds what other VQGANs have.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .attention_in_pieces import attend
from .configuration_simvq_image import SimVQImageConfig
from .foldable_codebook import FoldableCodebook
from .group_norm import ImageNorm
from .hooked_weights import computing_type, running_device
from .integer_codes import integers
from .latent_whitening import Whitening
from .quantization_baselines import make_quantizer
from .quantization_simvq import SimVQ
from .several_quantizers import check_count, quantize
from .tiling import run_tiled
from .verified_download import VerifiedDownload


@dataclass
class SimVQImageEncoderOutput(ModelOutput):
    """Output of encode; (h, w) is the image's size over config.downsample_factor, rounded up.

    Attributes:
        image_codes: (B, h, w) int64, in [0, codebook_size); of several quantizers (B, q, h, w).
        quantized_latents: (B, d, h, w), the codes' vectors.
        commitment_loss: float32 scalar, ``beta |z - sg[q]|^2 + |q - sg[z]|^2``.
        latents: (B, d, h, w), the encoder's output before quantization.
    """

    image_codes: torch.LongTensor | None = None
    quantized_latents: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class SimVQImageDecoderOutput(ModelOutput):
    """Output of decode.

    Attributes:
        pixel_values: (B, 3, H, W), trained towards [-1, 1] and not clamped. H and W are multiples of
            config.downsample_factor.
    """

    pixel_values: torch.FloatTensor | None = None


@dataclass
class SimVQImageOutput(ModelOutput):
    """Output of the model's forward: reconstruction, codes, loss, and the latents z (B, d, h, w)."""

    pixel_values: torch.FloatTensor | None = None
    image_codes: torch.LongTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


def _norm(channels: int, config: SimVQImageConfig) -> ImageNorm:
    return ImageNorm(channels, config.norm_groups, config.norm_per_position)


class ResidualBlock(GradientCheckpointingLayer):
    """Norm, SiLU, conv3x3, twice, around a shortcut. Convolutions have no bias."""

    def __init__(self, in_channels: int, out_channels: int, config: SimVQImageConfig):
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = _norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        if in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = self.shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + residual


class Attention(GradientCheckpointingLayer):
    """Single-head self-attention over the positions of an image (Esser et al. 2021, VQGAN)."""

    def __init__(self, channels: int, config: SimVQImageConfig):
        super().__init__()
        self.norm = _norm(channels, config)
        self.query = nn.Conv2d(channels, channels, kernel_size=1)
        self.key = nn.Conv2d(channels, channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        sequences = (layer(normed).flatten(2) for layer in (self.query, self.key, self.value))
        return hidden + self.out(attend(*sequences).reshape(hidden.shape))


class Upsample(nn.Module):
    """Doubles height and width: conv3x3 to four times the channels, then depth to space."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv(hidden)
        batch, channels, height, width = hidden.shape
        # DCR order: the offsets inside a 2 x 2 block are the slow axes of the channels, whereas in
        # torch's PixelShuffle (CRD) they are the fast ones. Weights do not carry over between the two.
        hidden = hidden.view(batch, 2, 2, channels // 4, height, width)
        hidden = hidden.permute(0, 3, 4, 1, 5, 2)
        return hidden.reshape(batch, channels // 4, 2 * height, 2 * width)


def _blocks(
    in_channels: int, out_channels: int, config: SimVQImageConfig, attention: bool = False
) -> nn.Sequential:
    """Residual blocks of one level, each followed by attention if that is wanted."""
    layers = []
    for width in [in_channels] + [out_channels] * (config.num_res_blocks - 1):
        layers.append(ResidualBlock(width, out_channels, config))
        if attention:
            layers.append(Attention(out_channels, config))
    return nn.Sequential(*layers)


def _middle(channels: int, config: SimVQImageConfig) -> nn.Sequential:
    """Residual blocks between the lowest level and the latents, with attention in between."""
    blocks = _blocks(channels, channels, config, config.attention)
    return blocks[:-1] if config.attention else blocks


class ImageEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] to latents (B, d, ceil(H / f), ceil(W / f))."""

    def __init__(self, config: SimVQImageConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(
            config.in_channels, config.base_channels, kernel_size=3, padding=1, bias=False
        )
        self.levels = nn.ModuleList()
        previous = config.base_channels
        for depth, width in enumerate(widths):
            level = nn.Module()
            last = depth == len(widths) - 1
            level.blocks = _blocks(previous, width, config, config.attention and last)
            level.downsample = (
                nn.Identity() if last else nn.Conv2d(width, width, 3, stride=2, padding=1)
            )
            self.levels.append(level)
            previous = width
        self.mid = _middle(previous, config)
        self.norm_out = _norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.codebook_dim, kernel_size=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.conv_in(pixel_values)
        for level in self.levels:
            hidden = level.downsample(level.blocks(hidden))
        hidden = self.mid(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class ImageDecoder(nn.Module):
    """Latents (B, d, h, w) to (B, 3, h * f, w * f). Levels run from the lowest resolution to the highest."""

    def __init__(self, config: SimVQImageConfig):
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.channel_multipliers)]
        previous = widths[0]
        self.conv_in = nn.Conv2d(config.codebook_dim, previous, kernel_size=3, padding=1)
        self.mid = _middle(previous, config)
        self.levels = nn.ModuleList()
        for depth, width in enumerate(widths):
            level = nn.Module()
            level.blocks = _blocks(previous, width, config, config.attention and depth == 0)
            last = depth == len(widths) - 1
            level.upsample = nn.Identity() if last else Upsample(width)
            self.levels.append(level)
            previous = width
        self.norm_out = _norm(previous, config)
        self.conv_out = nn.Conv2d(previous, config.in_channels, kernel_size=3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for level in self.levels:
            hidden = level.upsample(level.blocks(hidden))
        return self.conv_out(F.silu(self.norm_out(hidden)))


class SimVQImagePreTrainedModel(VerifiedDownload, PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = SimVQImageConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "Attention", "SimVQ"]
    # Half-precision codes are other codes: the quantizer stays in float32 whatever dtype is asked for.
    _keep_in_fp32_modules_strict = ["whitening", "quantizer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation, as in the original. transformers guards it so that weights that
        # came from a checkpoint are left alone.
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, Whitening, SimVQ)):
            module.reset_parameters()


class SimVQImageModel(FoldableCodebook, SimVQImagePreTrainedModel):
    """Images to codes and codes to images.

    Any height and width from one token upwards works; sizes that are not multiples of
    ``config.downsample_factor`` come back rounded up (SimVQImageProcessor pads and crops them). In half
    precision the quantizer stays in float32, but the encoder's rounding changes some codes: 1.6 % in bfloat16
    where it was measured.
    """

    def __init__(self, config: SimVQImageConfig):
        super().__init__(config)
        self.encoder = ImageEncoder(config)
        self.whitening = Whitening(config.codebook_dim) if config.whiten_latents else None
        self.quantizer = make_quantizer(config)
        self.decoder = ImageDecoder(config)
        self._tiling: tuple[int, int] | None = None
        self.post_init()

    def enable_tiling(self, tile_size: int = 512, overlap: int = 128) -> None:
        """Encode and decode large images tile by tile (inference only), so that memory stays bounded.

        Tiles see their own GroupNorm statistics (unless config.norm_per_position) and, with attention, nothing
        but themselves, so the result differs a little from that of the whole image; the cross-fade over the
        overlap keeps seams invisible. Some codes differ too, 0.6 % where it was measured without attention:
        tokenise all that is compared or trained on together with the same tiles.

        Args:
            tile_size: side of a tile in pixels; smaller images are not cut.
            overlap: pixels shared by neighbouring tiles. Both are multiples of the down-sampling factor.
        """
        factor = self.config.downsample_factor
        if tile_size < factor or tile_size % factor or overlap % factor:
            raise ValueError(
                f"tile_size and overlap must be multiples of {factor} (the down-sampling factor), "
                f"got tile_size={tile_size} and overlap={overlap}"
            )
        if not 0 < overlap <= tile_size // 2:
            raise ValueError(
                f"overlap must lie in (0, tile_size / 2], got overlap={overlap} of {tile_size}"
            )
        self._tiling = (tile_size // factor, overlap // factor)

    def disable_tiling(self) -> None:
        """Encode and decode every image whole again."""
        self._tiling = None

    @can_return_tuple
    def encode(
        self, pixel_values: Tensor, num_quantizers: int | None = None
    ) -> SimVQImageEncoderOutput:
        """Images to codes.

        Args:
            pixel_values: (B, 3, H, W) floating point in [-1, 1].
            num_quantizers: how many of the model's codebooks, the first ones; all of them by default.

        Raises:
            ValueError: if the shape, the type or a value cannot be those of images.
        """
        latents = self._encode_latents(pixel_values)
        if self.whitening is not None:
            latents = self.whitening(latents)
        if num_quantizers is not None:
            check_count(num_quantizers, self.config.num_quantizers)
        quantized, codes, commitment_loss = quantize(self.quantizer, latents, num_quantizers)
        if self.config.num_quantizers == 1:
            codes = codes[:, 0]
        output = SimVQImageEncoderOutput(codes, quantized, commitment_loss, latents)
        return output

    @can_return_tuple
    def decode(
        self, image_codes: Tensor | None = None, quantized_latents: Tensor | None = None
    ) -> SimVQImageDecoderOutput:
        """Codes, or vectors of codes, to images.

        Args:
            image_codes: (B, h, w) integers of any type in [0, codebook_size); a tensor, an array or a list. Of
                several codebooks (B, q, h, w), the codes of the first q.
            quantized_latents: (B, d, h, w) floating point. Give either this or image_codes.

        Raises:
            ValueError: if not exactly one of the two is given, or its shape, type or a value is impossible.
        """
        if (image_codes is None) == (quantized_latents is None):
            raise ValueError(
                "decode takes either image_codes or quantized_latents, exactly one of them"
            )
        if image_codes is not None:
            image_codes = integers("image_codes", image_codes, running_device(self))
            several = self.config.num_quantizers > 1
            if image_codes.ndim != 3 + several or image_codes.numel() == 0:
                wanted = "(B, q, h, w)" if several else "(B, h, w)"
                raise ValueError(
                    f"image_codes must be {wanted} and not empty, got shape {tuple(image_codes.shape)}"
                )
            quantized_latents = self.quantizer.lookup(image_codes)
        output = SimVQImageDecoderOutput(self._decode_latents(quantized_latents))
        return output

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, quantize: bool = True, num_quantizers: int | None = None
    ) -> SimVQImageOutput:
        """Encode, quantize and decode.

        Args:
            pixel_values: (B, 3, H, W) floating point in [-1, 1].
            quantize: False decodes the latents as they are (autoencoder warm-up); the codes and the loss
                are still those of the quantizer.
            num_quantizers: as of encode.
        """
        encoded = self.encode(pixel_values, num_quantizers, return_dict=True)
        decoded = self._decode_latents(encoded.quantized_latents if quantize else encoded.latents)
        output = SimVQImageOutput(
            decoded, encoded.image_codes, encoded.commitment_loss, encoded.latents
        )
        return output

    def _encode_latents(self, pixel_values: Tensor) -> Tensor:
        self._check_pixels(pixel_values)
        pixel_values = pixel_values.to(computing_type(self.encoder.conv_in))
        if self._tiling is None or torch.is_grad_enabled():
            return self.encoder(pixel_values)
        tile, overlap = self._tiling
        return run_tiled(
            self.encoder,
            pixel_values,
            input_cell=self.config.downsample_factor,
            output_cell=1,
            tile=tile,
            overlap=overlap,
        )

    def _decode_latents(self, latents: Tensor) -> Tensor:
        if (
            latents.ndim != 4
            or latents.shape[1] != self.config.codebook_dim
            or latents.numel() == 0
        ):
            raise ValueError(
                f"quantized_latents must be (B, {self.config.codebook_dim}, h, w) and not empty, "
                f"got shape {tuple(latents.shape)}"
            )
        if not latents.is_floating_point():
            raise ValueError(f"quantized_latents must be floating point, got {latents.dtype}")
        latents = latents.to(computing_type(self.decoder.conv_in))
        if self._tiling is None or torch.is_grad_enabled():
            return self.decoder(latents)
        tile, overlap = self._tiling
        return run_tiled(
            self.decoder,
            latents,
            input_cell=1,
            output_cell=self.config.downsample_factor,
            tile=tile,
            overlap=overlap,
        )

    def _check_pixels(self, pixel_values: Tensor) -> None:
        channels, side = self.config.in_channels, self.config.downsample_factor
        shape = tuple(pixel_values.shape)
        if pixel_values.ndim != 4 or shape[1] != channels:
            raise ValueError(f"pixel_values must be (B, {channels}, H, W), got shape {shape}")
        if shape[0] == 0:
            raise ValueError(f"pixel_values is an empty batch: shape {shape}")
        if min(shape[2:]) < side:
            raise ValueError(
                f"an image of {shape[2]} x {shape[3]} pixels is smaller than one token "
                f"({side} x {side}): pad or enlarge it"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point in [-1, 1], got {pixel_values.dtype}: "
                "let SimVQImageProcessor prepare the images"
            )
        # In training the loop watches the loss instead: this check waits for the device.
        if (
            not (self.training or torch.compiler.is_compiling())
            and not pixel_values.isfinite().all()
        ):
            count = int((~pixel_values.isfinite()).sum())
            raise ValueError(f"pixel_values holds {count} NaN or infinite values")


__all__ = ["SimVQImageModel", "SimVQImagePreTrainedModel"]
