"""Decoder of the audio tokenizer: Vocos (ConvNeXt blocks at the frame rate, then an inverse STFT).

The position network's attention and norms are global over a clip. In a batch of clips of different
lengths they are masked, so that each clip gives what it gives alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_simvq_audio import SimVQAudioConfig

# Magnitudes are clipped here as in Vocos: exp of an early network's output would overflow.
LARGEST_MAGNITUDE = 100.0
ATTENTION_QUERIES = 1024


class Norm(nn.GroupNorm):
    """GroupNorm with 32 groups over the real frames; it accepts one value per group, as one frame gives."""

    def __init__(self, channels: int):
        super().__init__(num_groups=32, num_channels=channels, eps=1e-6)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden (B, C, T), mask (B, 1, T) of ones and zeros."""
        if mask is None:
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        dtype = hidden.dtype
        groups = hidden.float().unflatten(1, (self.num_groups, -1))
        real = mask[:, None].float()
        count = real.sum(dim=(2, 3), keepdim=True) * groups.shape[2]
        mean = (groups * real).sum(dim=(2, 3), keepdim=True) / count
        variance = ((groups - mean).square() * real).sum(dim=(2, 3), keepdim=True) / count
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(dtype)


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Zero what lies behind the end of a clip: a convolution's zero padding, in a batch."""
    return hidden if mask is None else hidden * mask.to(hidden.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution of width 3, twice, around the identity."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = Norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        inner = self.conv1(_masked(F.silu(self.norm1(hidden, mask)), mask))
        inner = self.dropout(F.silu(self.norm2(inner, mask)))
        return hidden + self.conv2(_masked(inner, mask))


class Attention(nn.Module):
    """Single-head self-attention over the frames of a clip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels)
        self.query = nn.Conv1d(channels, channels, kernel_size=1)
        self.key = nn.Conv1d(channels, channels, kernel_size=1)
        self.value = nn.Conv1d(channels, channels, kernel_size=1)
        self.out = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm(hidden, mask)
        query, key, value = (
            layer(normed).mT[:, None] for layer in (self.query, self.key, self.value)
        )
        allowed = None if mask is None else mask.bool()[:, None]
        # Some queries at a time: on the CPU, attention of so wide a head holds all of its scores.
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(some, key, value, attn_mask=allowed)
                for some in query.split(ATTENTION_QUERIES, dim=2)
            ],
            dim=2,
        )
        return hidden + self.out(attended[:, 0].mT)


class ConvNeXtBlock(GradientCheckpointingLayer):
    """Depthwise convolution, LayerNorm, two pointwise layers, layer scale."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.depthwise = nn.Conv1d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 1 / config.num_decoder_layers))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        inner = self.norm(self.depthwise(_masked(hidden, mask)).mT)
        inner = self.contract(F.gelu(self.expand(inner)))
        return hidden + (self.layer_scale * inner).mT


class InverseSTFT(nn.Module):
    """Frames to waveform by overlap-add with Hann windows, trimmed to T * hop samples ("same" padding)."""

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length

    def forward(self, spectrum: Tensor, mask: Tensor | None) -> Tensor:
        """Complex (B, n_fft / 2 + 1, T) to (B, T * hop); mask (B, 1, T)."""
        # The window is made here: transformers loses buffers that a checkpoint does not hold.
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=spectrum.device)[:, None]
        real = window.new_ones(1, 1, spectrum.shape[-1]) if mask is None else mask.float()
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window * real
        envelope = self._overlap_add(window.square() * real)
        # Behind the end of a shorter clip there may be no window: 0 / 1e-11 instead of 0 / 0.
        waveform = self._overlap_add(frames) / envelope.clamp(min=1e-11)
        if mask is None:
            return waveform
        return waveform * mask[:, 0].repeat_interleave(self.hop_length, dim=1)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        length = (frames.shape[-1] - 1) * self.hop_length + self.n_fft
        summed = F.fold(
            frames, (1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop_length)
        )
        trim = (self.n_fft - self.hop_length) // 2
        return summed[:, 0, 0, trim : length - trim]


class AudioDecoder(nn.Module):
    """Latents (B, d, T) to a waveform (B, 1, T * hop)."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.conv_in = nn.Conv1d(config.codebook_dim, channels, kernel_size=7, padding=3)
        self.position_net = nn.ModuleList(
            [
                ResidualBlock(channels, config.dropout),
                ResidualBlock(channels, config.dropout),
                Attention(channels),
                ResidualBlock(channels, config.dropout),
                ResidualBlock(channels, config.dropout),
                Norm(channels),
            ]
        )
        self.norm_in = nn.LayerNorm(channels, eps=1e-6)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.num_decoder_layers))
        self.norm_out = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, config.n_fft + 2)
        self.inverse_stft = InverseSTFT(config.n_fft, config.hop_length)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, T), true where a frame belongs to a clip; None if all do."""
        hidden = self.conv_in(_masked(latents, mask))
        for layer in self.position_net:
            hidden = layer(hidden, mask)
        hidden = self.norm_in(hidden.mT).mT
        for block in self.blocks:
            hidden = block(hidden, mask)
        spectrum = self.head(self.norm_out(hidden.mT)).mT
        # float32 and no autocast: half precision has neither the range for exp nor an FFT on the CPU.
        with torch.autocast(device_type=spectrum.device.type, enabled=False):
            log_magnitude, phase = spectrum.float().chunk(2, dim=1)
            # Clamped before exp, whose infinity would make the gradient NaN.
            magnitude = log_magnitude.clamp(max=math.log(LARGEST_MAGNITUDE)).exp()
            waveform = self.inverse_stft(torch.polar(magnitude, phase), mask)
        return waveform[:, None].to(latents.dtype)
