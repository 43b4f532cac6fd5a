"""Log-mel spectrogram, what the audio tokenizer's reconstruction is compared in."""

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from training.losses.spectrogram import spectrogram


class LogMelSpectrogram(nn.Module):
    """Logarithm of magnitudes in HTK mel bands up to half the sampling rate (fixture losses_audio).

    Equals the logarithm of torchaudio's MelSpectrogram(power=1), without needing that package.

    Args:
        sampling_rate: in Hz.
        n_fft, hop_length: window (Hann) and step in samples.
        n_mels: bands.
    """

    floor = 1e-7  # magnitudes below it count as silence: the logarithm stays finite

    def __init__(
        self,
        sampling_rate: int = 24_000,
        n_fft: int = 1024,
        hop_length: int = 256,
        n_mels: int = 100,
    ):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=n_mels,
            min_frequency=0.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="htk",
        )
        # Both follow from the arguments: no checkpoint needs them.
        self.register_buffer("filters", torch.from_numpy(filters).float().T, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Waveforms (B, 1, L) or (B, L) to (B, n_mels, 1 + L // hop_length), float32.

        Raises:
            ValueError: if the clips have no more than n_fft // 2 samples.
        """
        magnitudes = spectrogram(waveforms, self.n_fft, self.hop_length, self.window).abs()
        with torch.autocast(waveforms.device.type, enabled=False):
            return (self.filters @ magnitudes).clamp(min=self.floor).log()
