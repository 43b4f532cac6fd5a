"""Configuration of the SimVQ audio tokenizer."""

import math

from .configuration_checks import (
    MOST_LAYERS,
    Integers,
    Number,
    at_least,
    at_most,
    check_parameters,
    described,
    in_groups,
    levels,
    probability,
    strict_fields,
)
from .configuration_simvq_tokenizer import SimVQTokenizerConfig


@strict_fields
class SimVQAudioConfig(SimVQTokenizerConfig):
    """Configuration of SimVQAudioModel. The defaults are the published 24 kHz tokenizer with K = 4,096."""

    model_type = "simvq_audio"

    sampling_rate: int = described(24000, "sampling rate of the waveforms, in Hz", at_least(1))
    num_filters: int = described(
        32,
        "channels of the encoder's first convolution; each downsampling doubles them",
        at_least(1),
    )
    downsampling_ratios: Integers = described(
        (2, 4, 5, 8), "strides of the encoder, in order; their product is the hop length", levels
    )
    num_residual_layers: int = described(
        1, "residual blocks before each stride", at_least(1), at_most(MOST_LAYERS)
    )
    num_lstm_layers: int = described(
        2, "layers of the encoder's LSTM, 0 for none", at_least(0), at_most(MOST_LAYERS)
    )
    # The reflection at the clip's start still lets the first two frames see later samples.
    causal: bool = described(True, "whether the encoder's convolutions pad on the left only")
    streaming: bool = described(
        False,
        "whether every layer looks at the past alone, so that speech can be coded as it comes",
    )
    attention_window: int = described(
        128,
        "frames that the decoder's attention looks back on, itself included, in a stream",
        at_least(1),
    )
    codebook_size: int = described(4096, "K, number of codes", at_least(1))
    codebook_dim: int = described(512, "d, width of a code", at_least(1))
    hidden_size: int = described(
        768, "width of the decoder, a multiple of norm_groups", at_least(1)
    )
    norm_groups: int = described(
        32, "groups of the GroupNorms in the decoder's position network", at_least(1)
    )
    intermediate_size: int = described(
        2304, "width inside the decoder's ConvNeXt blocks", at_least(1)
    )
    num_decoder_layers: int = described(12, "ConvNeXt blocks", at_least(1), at_most(MOST_LAYERS))
    dropout: Number = described(
        0.1, "dropout in the decoder's position network, in training", probability
    )
    n_fft: int = described(
        1280,
        "window of the inverse STFT, at least the hop length and of the same parity",
        at_least(1),
    )
    weight_norm: bool = described(
        True,
        "whether the encoder's convolutions carry weight normalisation; remove_weight_norm() folds it",
    )

    def validate_architecture(self):
        """Refuse sizes that would make too large a model or do not fit each other."""
        in_groups("hidden_size", self.hidden_size, self.norm_groups)
        self.validate_quantizers()
        check_parameters(self._about_parameters())
        if self.streaming and not self.causal:
            raise ValueError("streaming=True needs causal=True: its encoder sees no later sample")
        if self.n_fft < self.hop_length or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"n_fft must be at least the hop length {self.hop_length} (the product of "
                f"downsampling_ratios) and differ from it by an even number, got {self.n_fft}"
            )

    def _about_parameters(self) -> int:
        width = self.num_filters * 2 ** len(self.downsampling_ratios)
        encoder = (2 * max(self.downsampling_ratios) + 4 * self.num_residual_layers) * width**2
        encoder += (8 * self.num_lstm_layers * width + 7 * self.codebook_dim) * width
        decoder = (7 * self.codebook_dim + 40 * self.hidden_size + self.n_fft) * self.hidden_size
        decoder += 2 * self.num_decoder_layers * self.hidden_size * self.intermediate_size
        return encoder + decoder + self.quantizer_parameters()

    @property
    def hop_length(self) -> int:
        """Samples that one code stands for."""
        return math.prod(self.downsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Codes per second."""
        return self.sampling_rate / self.hop_length

    @property
    def target_bandwidths(self) -> list[float]:
        """Kbit a second of the first quantizer, of the first two, and so on to all: EnCodec's name."""
        each = self.frame_rate * math.log2(self.codebook_size) / 1000
        return [count * each for count in range(1, self.num_quantizers + 1)]
