"""Short-time Fourier transform in full precision, for the mel loss and the discriminators."""

import torch
from torch import Tensor


def spectrogram(waveforms: Tensor, n_fft: int, hop_length: int, window: Tensor) -> Tensor:
    """Complex spectrogram, frames centred on their sample by reflecting the clip at both ends.

    Its magnitude has gradient zero at zero, so that silence needs no care.

    Args:
        waveforms: (B, 1, L) or (B, L), any floating type.
        n_fft, hop_length: in samples.
        window: (n_fft,) float32.

    Returns:
        (B, n_fft // 2 + 1, 1 + L // hop_length) complex64.

    Raises:
        ValueError: if a clip is not (B, 1, L) or (B, L), or has no more than n_fft // 2 samples: it
            cannot be reflected that far.
    """
    if waveforms.dim() == 3 and waveforms.shape[1] == 1:
        waveforms = waveforms.squeeze(1)
    if waveforms.dim() != 2:
        raise ValueError(f"waveforms must be (B, 1, L) or (B, L), got {tuple(waveforms.shape)}")
    if waveforms.shape[-1] <= n_fft // 2:
        raise ValueError(
            f"clips of {waveforms.shape[-1]} samples are too short for a spectrogram with n_fft={n_fft}: "
            f"they need at least {n_fft // 2 + 1}"
        )
    # Half precision has neither the range nor the operators of a Fourier transform.
    with torch.autocast(waveforms.device.type, enabled=False):
        return torch.stft(
            waveforms.float(), n_fft, hop_length, window=window, center=True, return_complex=True
        )
