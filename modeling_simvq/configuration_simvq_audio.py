"""Configuration of the SimVQ audio tokenizer."""

import math

from transformers import PreTrainedConfig

from .configuration_checks import (
    check_layers,
    check_parameters,
    codebook_parameters,
    number,
    refuse_misspelt,
    set_other_fields,
    truth,
    whole_number,
)
from .quantizer_names import QUANTIZERS


class SimVQAudioConfig(PreTrainedConfig):
    """Architecture of the audio tokenizer. The defaults are the published 24 kHz model with K = 4,096.

    Args:
        sampling_rate: of the waveforms, in Hz.
        num_filters: channels of the encoder's first convolution; each down-sampling doubles them.
        downsampling_ratios: strides of the encoder in the order in which they are applied.
        num_residual_layers: residual blocks before each down-sampling.
        num_lstm_layers: layers of the encoder's LSTM, 0 for none.
        causal: whether encoder convolutions pad on the left only. (The reflection at the clip's start
            still lets the first two frames see later samples.)
        codebook_size: K, number of codes.
        codebook_dim: d, channels of the latents.
        commitment_cost: beta of the paper's equation 7, weight of the encoder's side of the loss.
        quantizer: "simvq", or what the paper compares it with: "vq", "vq_ema", "fc", "fsq", "lfq", "lc"
            (see make_quantizer).
        quantizer_options: further arguments of the quantizer; of SimVQ basis_dim, basis_init,
            projection_hidden_dim, train_basis, train_projection, rotation_trick. None are the paper's method.
        hidden_size: width of the decoder, a multiple of 32 (GroupNorm has 32 groups).
        intermediate_size: width inside the decoder's ConvNeXt blocks.
        num_decoder_layers: number of ConvNeXt blocks.
        dropout: in the decoder's position network, in training only.
        n_fft: window of the inverse STFT, at least the hop length and of the same parity.
        weight_norm: whether encoder convolutions carry weight normalisation; remove_weight_norm() clears it.

    Raises:
        ValueError: naming the field, if a value is impossible.
        TypeError: if a field's name is misspelt.
    """

    model_type = "simvq_audio"

    def __init__(
        self,
        sampling_rate: int = 24000,
        num_filters: int = 32,
        downsampling_ratios: tuple[int, ...] = (2, 4, 5, 8),
        num_residual_layers: int = 1,
        num_lstm_layers: int = 2,
        causal: bool = True,
        codebook_size: int = 4096,
        codebook_dim: int = 512,
        commitment_cost: float = 0.25,
        quantizer: str = "simvq",
        quantizer_options: dict | None = None,
        hidden_size: int = 768,
        intermediate_size: int = 2304,
        num_decoder_layers: int = 12,
        dropout: float = 0.1,
        n_fft: int = 1280,
        weight_norm: bool = True,
        **kwargs,
    ):
        self.sampling_rate = whole_number("sampling_rate", sampling_rate)
        self.num_filters = whole_number("num_filters", num_filters)
        if not isinstance(downsampling_ratios, (list, tuple)) or not downsampling_ratios:
            raise ValueError(
                f"downsampling_ratios must be a non-empty list, got {downsampling_ratios!r}"
            )
        self.downsampling_ratios = [
            whole_number("downsampling_ratios", r) for r in downsampling_ratios
        ]
        self.num_residual_layers = whole_number("num_residual_layers", num_residual_layers)
        self.num_lstm_layers = whole_number("num_lstm_layers", num_lstm_layers, low=0)
        self.causal = truth("causal", causal)
        self.codebook_size = whole_number("codebook_size", codebook_size)
        self.codebook_dim = whole_number("codebook_dim", codebook_dim)
        self.commitment_cost = number("commitment_cost", commitment_cost)
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        self.quantizer = quantizer
        if not isinstance(quantizer_options, (dict, type(None))):
            raise ValueError(f"quantizer_options must be a mapping, got {quantizer_options!r}")
        self.quantizer_options = dict(quantizer_options or {})
        self.hidden_size = whole_number("hidden_size", hidden_size)
        self.intermediate_size = whole_number("intermediate_size", intermediate_size)
        self.num_decoder_layers = whole_number("num_decoder_layers", num_decoder_layers)
        self.dropout = number("dropout", dropout)
        self.n_fft = whole_number("n_fft", n_fft)
        self.weight_norm = truth("weight_norm", weight_norm)
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, got {dropout}")
        if self.hidden_size % 32:
            raise ValueError(
                f"hidden_size must be a multiple of 32 (GroupNorm has 32 groups), got {hidden_size}"
            )
        for name in ("num_residual_layers", "num_lstm_layers", "num_decoder_layers"):
            check_layers(name, getattr(self, name))
        if len(self.downsampling_ratios) > 16:
            raise ValueError(
                f"downsampling_ratios may have at most 16 strides, got {len(self.downsampling_ratios)}"
            )
        check_parameters(self._about_parameters())
        if self.n_fft < self.hop_length or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"n_fft must be at least the hop length {self.hop_length} (the product of "
                f"downsampling_ratios) and differ from it by an even number, got {n_fft}"
            )
        refuse_misspelt(kwargs, known=list(vars(self)))
        set_other_fields(super().__init__, kwargs)

    def _about_parameters(self) -> int:
        width = self.num_filters * 2 ** len(self.downsampling_ratios)
        encoder = (2 * max(self.downsampling_ratios) + 4 * self.num_residual_layers) * width**2
        encoder += (8 * self.num_lstm_layers * width + 7 * self.codebook_dim) * width
        decoder = (7 * self.codebook_dim + 40 * self.hidden_size + self.n_fft) * self.hidden_size
        decoder += 2 * self.num_decoder_layers * self.hidden_size * self.intermediate_size
        quantizer = codebook_parameters(
            self.codebook_size, self.codebook_dim, self.quantizer_options
        )
        return encoder + decoder + quantizer

    @property
    def hop_length(self) -> int:
        """Samples that one code stands for."""
        return math.prod(self.downsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Codes per second."""
        return self.sampling_rate / self.hop_length
