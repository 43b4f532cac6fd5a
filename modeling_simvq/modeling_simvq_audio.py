"""SimVQ audio tokenizer: SEANet encoder, SimVQ quantizer, Vocos decoder.

The architecture is that of the SimVQ authors (arXiv 2411.02038, section 5, after WavTokenizer; parity is
tested against outputs of their code, tests/fixtures/audio_*).
"""

import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import can_return_tuple

from .attention_in_pieces import attend
from .audio_decoding_in_pieces import DecodesInPieces
from .audio_input_checks import check_codes, check_latents, check_waveforms
from .audio_outputs import (
    AudioPast,
    SimVQAudioDecoderOutput,
    SimVQAudioEncoderOutput,
    SimVQAudioOutput,
)
from .audio_stream import TakesChunks
from .clip_lengths import clip_lengths, mask_of_clips
from .configuration_simvq_audio import SimVQAudioConfig
from .foldable_codebook import FoldableCodebook
from .hooked_weights import computing_type, running_device
from .integer_codes import integers
from .latent_whitening import Whitening
from .lstm import LSTM
from .peer_arguments import (
    CountsFrames,
    check_past,
    check_scales,
    decoded_frames,
    of_dac,
    of_encodec,
    one_mask,
    quantizers_for,
    with_channel,
    without_channel,
    without_chunks,
)
from .quantization_baselines import make_quantizer
from .quantization_simvq import SimVQ
from .several_quantizers import look_up, quantize
from .streaming_layers import (
    State,
    add_to_waveform,
    attend_to_past,
    convolve_few,
    map_few,
    name_layers,
    overlap_add,
    recur,
    unplain_layer,
    with_past,
)
from .verified_download import VerifiedDownload
from .weight_norm_conv1d import (
    LengthAndDirection,
    WeightNormConv1d,
    in_the_form_of,
    set_weight_norm,
    stored_with_weight_norm,
)

# Without gradients the encoder's convolutions run on so many seconds at a time, with the same result.
ENCODER_CHUNK_SECONDS = 10

# What layers know besides their input: the lengths or the mask of a batch of clips, or a stream's state.
Context = Tensor | State | None


# Encoder of the audio tokenizer: SEANet (strided convolutions, then an LSTM), from waveform to latents.
#
# Layers as in the original (fixtures audio_*): ELU, weight-normalised convolutions, reflect padding. Every
# layer can be told the true lengths of a right-padded batch. It then pads each clip where that clip ends,
# so that no clip sees what it was batched with.


def reflect_pad(hidden: Tensor, left: int, right: Tensor, most: int, lengths: Tensor) -> Tensor:
    """Pad every clip of a batch by reflection at its own two ends.

    A clip too short to be reflected is first extended by zeros, and the extension is cut off again, as
    the original does.

    Args:
        hidden: (B, C, T); clip b occupies the first lengths[b] positions, the rest is ignored.
        left: number of positions to add at the start.
        right: (B,) number of positions to add at the end of each clip.
        most: the largest that right can be.
        lengths: (B,), at least 1 and at most T.

    Returns:
        (B, C, left + T + most); only the first left + lengths[b] + right[b] positions of clip b mean
        anything.
    """
    batch, channels, width = hidden.shape
    ends = lengths[:, None]
    before = torch.arange(-left, 0, device=hidden.device).expand(batch, left)
    after = ends + torch.arange(most, device=hidden.device)
    longest_pad = right.clamp(min=left)[:, None]
    extended = torch.where(ends > longest_pad, ends, longest_pad + 1)
    positions = torch.cat([before, after], dim=1)
    sources = positions.abs()
    sources = torch.where(sources >= extended, 2 * (extended - 1) - sources, sources)
    # A source at or behind the end lies in the zeros that extend a short clip.
    real = ((sources < ends) & (sources >= 0))[:, None]
    sources = sources.clamp(0, width - 1)[:, None].expand(-1, channels, -1)
    values = hidden.gather(2, sources) * real
    targets = (positions + left)[:, None].expand(-1, channels, -1)
    return F.pad(hidden, (left, most)).scatter(2, targets, values)


class PaddedConv1d(nn.Module):
    """Convolution with reflect padding such that T positions become ceil(T / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        config: SimVQAudioConfig,
    ):
        super().__init__()
        kind = WeightNormConv1d if config.weight_norm else nn.Conv1d
        self.conv = kind(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation)
        self.stride, self.streaming = stride, config.streaming
        padding = dilation * (kernel_size - 1) + 1 - stride
        self.right = 0 if config.causal else padding // 2
        self.left = padding - self.right

    def forward(self, hidden: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        """(B, C, T) to (B, C', ceil(T / stride)), and the clips' new lengths, or a stream's state."""
        if self.streaming and lengths is not None:
            return self.step(hidden, lengths, None), lengths
        if self.streaming:
            return self.conv(with_past(self, hidden, self.left, None)), None
        width = hidden.shape[-1]
        extra = -width % self.stride
        if lengths is None and width > max(self.left, self.right + extra):
            hidden = F.pad(hidden, (self.left, self.right + extra), mode="reflect")
            return self.conv(hidden), None
        known = lengths
        if lengths is None:
            lengths = torch.full((len(hidden),), width, device=hidden.device)
        right = self.right + (-lengths) % self.stride
        hidden = reflect_pad(hidden, self.left, right, self.right + self.stride - 1, lengths)
        frames = -(-width // self.stride)
        hidden = self.conv(hidden)[..., :frames]
        return hidden, None if known is None else -(-lengths // self.stride)

    def step(self, hidden: Tensor, state: State, place: int | None) -> Tensor:
        """Convolve the next positions of a stream; place as in `product`."""
        return convolve_few(self.conv, with_past(self, hidden, self.left, state), place)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Weights may come folded or not, whatever this layer is.
        in_the_form_of(self.conv, state_dict, prefix + "conv.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class SEANetBlock(nn.Module):
    """ELU and a dilated convolution to half the width, ELU and a pointwise one back; pointwise shortcut."""

    def __init__(self, channels: int, dilation: int, config: SimVQAudioConfig):
        super().__init__()
        inner = max(1, channels // 2)
        self.conv1 = PaddedConv1d(channels, inner, 3, dilation=dilation, config=config)
        self.conv2 = PaddedConv1d(inner, channels, 1, config=config)
        self.shortcut = PaddedConv1d(channels, channels, 1, config=config)

    def forward(self, hidden: Tensor, lengths: Context) -> Tensor:
        inner, _ = self.conv1(F.elu(hidden), lengths)
        inner, _ = self.conv2(F.elu(inner), lengths)
        shortcut, _ = self.shortcut(hidden, lengths)
        return shortcut + inner


class Downsampling(nn.Module):
    """Residual blocks, ELU, and a convolution that takes every stride-th position at twice the width."""

    def __init__(self, channels: int, stride: int, config: SimVQAudioConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            SEANetBlock(channels, 2**depth, config) for depth in range(config.num_residual_layers)
        )
        self.conv = PaddedConv1d(channels, 2 * channels, 2 * stride, stride=stride, config=config)

    def forward(self, hidden: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        for block in self.blocks:
            hidden = block(hidden, lengths)
        return self.conv(F.elu(hidden), lengths)


class AudioEncoder(nn.Module):
    """(B, 1, L) to latents (B, d, ceil(L / hop))."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        self.hop_length, self.streaming = config.hop_length, config.streaming
        channels = config.num_filters
        self.conv_in = PaddedConv1d(1, channels, 7, config=config)
        self.levels = nn.ModuleList()
        for stride in config.downsampling_ratios:
            self.levels.append(Downsampling(channels, stride, config))
            channels *= 2
        self.lstm = None
        if config.num_lstm_layers:
            self.lstm = LSTM(channels, channels, config.num_lstm_layers)
        self.conv_out = PaddedConv1d(channels, config.codebook_dim, 7, config=config)

    def forward(
        self, waveform: Tensor, lengths: Tensor | None = None, chunk_frames: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents, and with lengths the number of frames of every clip.

        Args:
            waveform: (B, 1, L).
            lengths: (B,) samples of each clip of a right-padded batch; None if all fill their rows.
            chunk_frames: run the convolutions on so many frames at a time. The result is the same up to
                rounding: every chunk sees the samples that it depends on, and the LSTM's state is carried.
        """
        if self.streaming:
            waveform, frames = self.whole_frames(waveform, lengths)
            hidden, _ = self._convolve(waveform, None)
            hidden, _ = self._recur(hidden, None)
            return self.conv_out(F.elu(hidden), None)[0], frames
        if chunk_frames is None:
            hidden, frames = self._convolve(waveform, lengths)
            hidden, _ = self._recur(hidden, None)
        else:
            hidden = self._in_chunks(waveform, lengths, chunk_frames)
            frames = None if lengths is None else -(-lengths // self.hop_length)
        latents, _ = self.conv_out(F.elu(hidden), frames)
        return latents, frames

    def whole_frames(
        self, waveform: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Fill the last frame with silence; count the frames of each clip."""
        filled = F.pad(waveform, (0, -waveform.shape[-1] % self.hop_length))
        return filled, None if lengths is None else -(-lengths // self.hop_length)

    def step(self, waveform: Tensor, state: State, place: int = 0) -> Tensor:
        """Latents (B, d, t) of the next t * hop samples of a stream.

        They are the very same in whatever pieces a stream comes: layers of many positions a frame take one
        frame at a time, the last ones, with most of the weights, several at fixed places.

        Args:
            place: frames of the stream before these.
        """
        pieces, last = [], self.levels[-1]
        for frame in waveform.split(self.hop_length, dim=-1):
            hidden, _ = self.conv_in(frame, state)
            for level in self.levels[:-1]:
                hidden, _ = level(hidden, state)
            for block in last.blocks:
                hidden = block(hidden, state)
            pieces.append(F.elu(hidden))
        hidden = last.conv.step(torch.cat(pieces, dim=-1), state, place)
        if self.lstm is not None:
            hidden = recur(self.lstm, hidden, state, place)
        # An ELU too rounds by the place in its tensor.
        activated = [F.elu(frame.contiguous()) for frame in hidden.split(1, dim=-1)]
        return self.conv_out.step(torch.cat(activated, dim=-1), state, place)

    def _convolve(self, waveform: Tensor, lengths: Context) -> tuple[Tensor, Context]:
        hidden, lengths = self.conv_in(waveform, lengths)
        for level in self.levels:
            hidden, lengths = level(hidden, lengths)
        return hidden, lengths

    def _recur(self, hidden: Tensor, state: tuple | None) -> tuple[Tensor, tuple | None]:
        if self.lstm is None:
            return hidden, None
        out, state = self.lstm(hidden.mT, state)
        return hidden + out.mT, state

    def _in_chunks(self, waveform: Tensor, lengths: Tensor | None, chunk_frames: int) -> Tensor:
        hop, (batch, _, width) = self.hop_length, waveform.shape
        frames, context, state, whole = -(-width // hop), self.context_frames, None, None
        counts = [width] * batch if lengths is None else lengths.tolist()
        rows = list(range(batch))
        for start in range(0, frames, chunk_frames):
            kept = [i for i, row in enumerate(rows) if counts[row] > start * hop]
            if not kept:
                break
            if len(kept) < len(rows):  # clips that ended before this chunk are left out
                rows = [rows[i] for i in kept]
                state = None if state is None else tuple(part[:, kept] for part in state)
            stop = min(start + chunk_frames, frames)
            # Causal layers need what follows too: the reflection at the clip's start reads it.
            first, last = max(0, start - context), stop + context
            piece = waveform[..., first * hop : last * hop]
            piece = piece if len(rows) == batch else piece[rows]
            within = None
            if lengths is not None:
                within = (lengths[rows] - first * hop).clamp(max=piece.shape[-1])
            hidden, _ = self._convolve(piece, within)
            hidden, state = self._recur(hidden[..., start - first : stop - first], state)
            if whole is None:
                whole = hidden.new_zeros(batch, hidden.shape[1], frames)
            whole[rows, :, start:stop] = hidden
        return whole

    @property
    def context_frames(self) -> int:
        """Frames on either side on which the convolutions before the LSTM can depend."""
        reach, step = self.conv_in.left + self.conv_in.right, 1
        for level in self.levels:
            for conv in [*(block.conv1 for block in level.blocks), level.conv]:
                reach += step * (conv.left + conv.right)
                step *= conv.stride
            reach += step  # padding at the end of a clip that fills no whole frame
        return math.ceil(reach / self.hop_length) + 1


# Decoder of the audio tokenizer: Vocos (ConvNeXt blocks at the frame rate, then an inverse STFT).
#
# The position network's attention and norms are global over a clip. In a batch of clips of different
# lengths they are masked, so that each clip gives what it gives alone.


# Magnitudes are clipped here as in Vocos: exp of an early network's output would overflow.
LARGEST_MAGNITUDE = 100.0


class Norm(nn.GroupNorm):
    """GroupNorm over the real frames, which accepts one value per group; in a stream LayerNorm of each frame.

    A group has too few channels for the moments of a single frame: two of them would become 1 and -1.
    """

    def __init__(self, config: SimVQAudioConfig):
        super().__init__(config.norm_groups, config.hidden_size, eps=1e-6)
        self.streaming = config.streaming

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        """hidden (B, C, T), mask (B, 1, T) of ones and zeros."""
        if self.streaming:
            shape = self.weight.shape
            return F.layer_norm(hidden.mT, shape, self.weight, self.bias, self.eps).mT
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


class FrameConv1d(nn.Conv1d):
    """Convolution over frames that keeps their number: centred, or over the past in a stream."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, config, groups: int = 1
    ):
        padding = 0 if config.streaming else kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, groups=groups)
        self.streaming = config.streaming

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        """(B, C, T) to (B, C', T); mask (B, 1, T): what lies behind a clip's end counts as zeros."""
        if self.streaming:
            hidden = with_past(self, hidden, self.kernel_size[0] - 1, mask)
            few = mask is not None and self.groups == 1
            return convolve_few(self, hidden) if few else super().forward(hidden)
        return super().forward(hidden if mask is None else hidden * mask.to(hidden.dtype))


class ResNetBlock(nn.Module):
    """Norm, SiLU, convolution of width 3, twice, around the identity."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.norm1 = Norm(config)
        self.conv1 = FrameConv1d(channels, channels, 3, config)
        self.norm2 = Norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = FrameConv1d(channels, channels, 3, config)

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden, mask)), mask)
        inner = self.dropout(F.silu(self.norm2(inner, mask)))
        return hidden + self.conv2(inner, mask)


class Attention(nn.Module):
    """Single-head self-attention over the frames of a clip, or the last ones of a stream."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.norm = Norm(config)
        self.query = nn.Conv1d(channels, channels, kernel_size=1)
        self.key = nn.Conv1d(channels, channels, kernel_size=1)
        self.value = nn.Conv1d(channels, channels, kernel_size=1)
        self.out = nn.Conv1d(channels, channels, kernel_size=1)
        self.window = config.attention_window if config.streaming else None

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        normed = self.norm(hidden, mask)
        query, key, value = (layer(normed) for layer in (self.query, self.key, self.value))
        if self.window is not None:
            return hidden + self.out(attend_to_past(self, query, key, value, self.window, mask))
        allowed = None if mask is None else mask.bool()
        return hidden + self.out(attend(query, key, value, allowed))


class ConvNeXtBlock(GradientCheckpointingLayer):
    """Depthwise convolution, LayerNorm, two pointwise layers, layer scale."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.depthwise = FrameConv1d(channels, channels, 7, config, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 1 / config.num_decoder_layers))

    def forward(self, hidden: Tensor, mask: Context) -> Tensor:
        inner, in_stream = self.norm(self.depthwise(hidden, mask).mT), isinstance(mask, dict)
        inner = map_few(self.contract, F.gelu(map_few(self.expand, inner, in_stream)), in_stream)
        return hidden + (self.layer_scale * inner).mT


class InverseSTFT(nn.Module):
    """Frames to waveform by overlap-add with Hann windows, trimmed to T * hop samples ("same" padding)."""

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length

    def forward(self, magnitude: Tensor, phase: Tensor, mask: Context) -> Tensor:
        """Two of (B, n_fft / 2 + 1, T) to (B, T * hop), in a stream behind by `lag`; mask (B, 1, T)."""
        spectrum = torch.polar(magnitude, phase)
        # The window is made here: transformers loses buffers that a checkpoint does not hold.
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=spectrum.device)[:, None]
        if isinstance(mask, dict):
            frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window
            return add_to_waveform(self, frames, window[:, 0], self.hop_length, mask)
        real = window.new_ones(1, 1, spectrum.shape[-1]) if mask is None else mask.float()
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window * real
        envelope = self._overlap_add(window.square() * real)
        # Behind the end of a shorter clip there may be no window: 0 / 1e-11 instead of 0 / 0.
        waveform = self._overlap_add(frames) / envelope.clamp(min=1e-11)
        if mask is None:
            return waveform
        return waveform * mask[:, 0].repeat_interleave(self.hop_length, dim=1)

    @property
    def lag(self) -> int:
        """Samples of the next frames that a frame's own samples need."""
        return (self.n_fft - self.hop_length) // 2

    def _overlap_add(self, frames: Tensor) -> Tensor:
        summed = overlap_add(frames, self.hop_length)
        return summed[:, self.lag : summed.shape[1] - self.lag]


class AudioDecoder(nn.Module):
    """Latents (B, d, T) to a waveform (B, 1, T * hop)."""

    def __init__(self, config: SimVQAudioConfig):
        super().__init__()
        channels = config.hidden_size
        self.streaming = config.streaming
        self.conv_in = FrameConv1d(config.codebook_dim, channels, 7, config)
        self.position_net = nn.ModuleList(
            [
                ResNetBlock(config),
                ResNetBlock(config),
                Attention(config),
                ResNetBlock(config),
                ResNetBlock(config),
                Norm(config),
            ]
        )
        self.norm_in = nn.LayerNorm(channels, eps=1e-6)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.num_decoder_layers))
        self.norm_out = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, 2 * (config.n_fft // 2 + 1))
        self.inverse_stft = InverseSTFT(config.n_fft, config.hop_length)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, state: State | None = None
    ) -> Tensor:
        """mask: (B, 1, T), true where a frame belongs to a clip; None if all do. state: of a stream."""
        # Layers that look at the past alone see nothing behind a clip's end.
        context = state if self.streaming else mask
        hidden = self.conv_in(latents, context)
        for layer in self.position_net:
            hidden = layer(hidden, context)
        hidden = self.norm_in(hidden.mT).mT
        for block in self.blocks:
            hidden = block(hidden, context)
        spectrum = map_few(self.head, self.norm_out(hidden.mT), state is not None).mT
        # float32 and no autocast: half precision has neither the range for exp nor an FFT on the CPU.
        with torch.autocast(device_type=spectrum.device.type, enabled=False):
            log_magnitude, phase = spectrum.float().chunk(2, dim=1)
            # Clamped before exp, whose infinity would make the gradient NaN.
            magnitude = log_magnitude.clamp(max=math.log(LARGEST_MAGNITUDE)).exp()
            waveform = self.inverse_stft(magnitude, phase, mask if state is None else state)
        return waveform[:, None].to(latents.dtype)


class SimVQAudioPreTrainedModel(VerifiedDownload, PreTrainedAudioTokenizerBase):
    """Loading, saving and initialisation."""

    config_class = SimVQAudioConfig
    base_model_prefix = ""
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["AudioEncoder", "ConvNeXtBlock", "SimVQ"]
    # Half-precision codes are other codes: the quantizer stays in float32 whatever dtype is asked for.
    _keep_in_fp32_modules_strict = ["whitening", "quantizer"]

    @classmethod
    def _load(cls, stored: Iterable[str] | None, name, *args, config=None, **kwargs) -> tuple:
        # The model is made as its weights are stored, and only then gets the form that is wanted.
        wanted = None
        if stored is not None and kwargs.get("key_mapping") is None:
            form = stored_with_weight_norm(stored)
            if isinstance(config, PreTrainedConfig):
                wanted, config = config.weight_norm, copy.deepcopy(config)
                config.weight_norm = form
            else:
                chosen = SimVQAudioConfig(weight_norm=kwargs.get("weight_norm", form))
                wanted = chosen.weight_norm
                kwargs["weight_norm"] = form
        model, report = super()._load(stored, name, *args, config=config, **kwargs)
        if wanted is not None:
            model._set_weight_norm(wanted)
        return model, report

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation, as in the original. transformers guards it so that weights that
        # came from a checkpoint are left alone.
        if isinstance(module, ConvNeXtBlock):
            init.constant_(module.layer_scale, 1 / self.config.num_decoder_layers)
        elif isinstance(module, LengthAndDirection):
            # Loading visits this and not the convolution when only the weight is missing.
            init.kaiming_uniform_(module.original1, a=5**0.5)
            norm = torch.linalg.vector_norm(module.original1, dim=(1, 2), keepdim=True)
            init.copy_(module.original0, norm)
        elif isinstance(module, WeightNormConv1d):
            bound = module.parametrizations.weight.original1[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(
            module, (nn.Conv1d, nn.Linear, LSTM, nn.GroupNorm, nn.LayerNorm, Whitening, SimVQ)
        ):
            module.reset_parameters()


class SimVQAudioModel(
    TakesChunks, DecodesInPieces, CountsFrames, FoldableCodebook, SimVQAudioPreTrainedModel
):
    """Waveforms to codes and codes to waveforms.

    Any length from one sample upwards works; a length that is no multiple of ``config.hop_length`` comes
    back rounded up. Clips of a right-padded batch give exactly what they give alone (up to rounding), at
    every frame, if encode is told the padding_mask and decode the audio_codes_mask. In half precision the
    quantizer stays in float32, but the encoder's rounding changes some codes.
    """

    def __init__(self, config: SimVQAudioConfig):
        super().__init__(config)
        self.encoder = AudioEncoder(config)
        self.whitening = Whitening(config.codebook_dim) if config.whiten_latents else None
        self.quantizer = make_quantizer(config)
        self.decoder = AudioDecoder(config)
        name_layers(self)
        self.post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save as PreTrainedModel does; the folder's code then serves both Auto classes."""
        # transformers names one Auto class in auto_map, the one given to register_for_auto_class.
        names = dict(getattr(self.config, "auto_map", None) or {})
        names["AutoModelForAudioTokenization"] = "modeling_simvq_audio.SimVQAudioModel"
        self.config.auto_map = names
        super().save_pretrained(*args, **kwargs)

    def remove_weight_norm(self) -> None:
        """Fold weight normalisation into plain weights, for inference. A saved model stays folded."""
        self._set_weight_norm(False)

    def _set_weight_norm(self, wanted: bool) -> None:
        set_weight_norm(self.encoder, wanted)
        if (
            self.config.weight_norm != wanted
        ):  # other models may have been made with this configuration
            self.config = copy.deepcopy(self.config)
            self.config.weight_norm = wanted

    @can_return_tuple
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        encoder_past_key_values: AudioPast | None = None,
        padding_cache: None = None,
        use_streaming: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        n_quantizers: int | None = None,
        bandwidth: float | None = None,
    ) -> SimVQAudioEncoderOutput:
        """Waveforms to codes.

        Args:
            input_values: (B, 1, L) or (B, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L) or (B, 1, L), 1 for samples and 0 for the padding to their right.
            num_quantizers: how many of the model's codebooks, the first ones; all of them by default.
            encoder_past_key_values: of the chunks before, from their output (streaming models).
            padding_cache: Mimi's; None here, where encoder_past_key_values holds all of the state.
            use_streaming: the samples are a chunk of a stream, the first one if there is no past. Only full
                frames get codes; the others wait in the past for the next chunk.
            attention_mask: another name of padding_mask.
            n_quantizers: the same, as in DAC.
            bandwidth: the same, as in EnCodec, in kbit a second: one of config.target_bandwidths.

        Raises:
            ValueError: if the shape, the type or a value cannot be those of waveforms; if the model cannot
                stream, or not give so many bits.
        """
        if isinstance(padding_mask, int):  # DAC's order
            padding_mask, n_quantizers = None, padding_mask
        count = quantizers_for(self.config, num_quantizers, n_quantizers, bandwidth)
        if padding_cache is not None:
            raise ValueError(
                "padding_cache must be left out: encoder_past_key_values holds all state"
            )
        input_values = with_channel(input_values)
        check_past("encoder", encoder_past_key_values, AudioPast, input_values.shape[0])
        padding_mask = without_channel(one_mask(padding_mask, attention_mask))
        # In training the loop watches the loss instead: a look at the values waits for the device.
        check_waveforms(input_values, not (self.training or torch.compiler.is_compiling()))
        if self._is_streamed(bool(use_streaming), encoder_past_key_values, padding_mask):
            return self._encode_next(
                input_values,
                encoder_past_key_values or self._no_past(),
                count or self.config.num_quantizers,
            )
        lengths = None
        if padding_mask is not None:
            batch, _, width = input_values.shape
            lengths = clip_lengths(
                "padding_mask", padding_mask, (batch, width), input_values.device
            )
        if lengths is not None:  # whatever the padding holds, no clip comes near it
            input_values = input_values.masked_fill(~mask_of_clips(lengths, width), 0)
        # A graph takes any number of frames: no loop over them.
        chunk, in_pieces = None, not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if in_pieces:
            chunk = max(1, round(ENCODER_CHUNK_SECONDS * self.config.frame_rate))
        input_values = input_values.to(computing_type(self.decoder.conv_in))
        exact = self.config.streaming and in_pieces and not self.training
        if exact and unplain_layer(self.encoder) is None:
            waveform, frames = self.encoder.whole_frames(input_values, lengths)
            latents = self._latents_in_order(waveform, {}, 0)
        else:
            latents, frames = self.encoder(input_values, lengths, chunk)
            if self.whitening is not None:
                real = None if frames is None else mask_of_clips(frames, latents.shape[-1])[:, 0]
                latents = self.whitening(latents, real)
        batch, _, width = latents.shape
        if frames is None:
            mask = torch.ones(batch, 1, width, dtype=torch.bool, device=latents.device)
            quantized, codes, commitment_loss = quantize(self.quantizer, latents, count)
        else:
            mask = mask_of_clips(frames, width)
            # What lies behind a clip's end takes part neither in the loss nor in the batch.
            latents = latents.masked_fill(~mask, 0)
            quantized, codes, commitment_loss = self._quantize_real(latents, mask, count)
        output = SimVQAudioEncoderOutput(codes, mask, quantized, commitment_loss, latents)
        return output

    @can_return_tuple
    def decode(
        self,
        audio_codes: Tensor | None = None,
        padding_mask: Tensor | None = None,
        decoder_past_key_values: AudioPast | None = None,
        use_cache: bool | None = None,
        *,
        quantized_latents: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        quantized_representation: Tensor | None = None,
        audio_scales: list | None = None,
        last_frame_pad_length: int = 0,
    ) -> SimVQAudioDecoderOutput:
        """Codes, or vectors of codes, to waveforms.

        Args:
            audio_codes: (B, q, T) integers of any type in [0, codebook_size); a tensor, an array or a list.
                q is 1, or up to num_quantizers: the first codebooks' codes. Also with EnCodec's axis of chunks,
                (1, B, q, T).
            padding_mask: (B, L), of the clips' samples: as audio_codes_mask, and the waveforms are cut to L.
            decoder_past_key_values: of the chunks before, from their output (streaming models).
            use_cache: the codes are a chunk of a stream, the first one if there is no past. Only the samples
                that no later code changes are returned; SimVQAudioStream.flush gives the last ones.
            quantized_latents: (B, d, T) floating point. Give either this or audio_codes.
            audio_codes_mask: (B, 1, T) or (B, T), true for real codes, as encode returns it; None if all are.
            quantized_representation: another name of quantized_latents, DAC's.
            audio_scales: EnCodec's; None, or a list of None.
            last_frame_pad_length: EnCodec's; 0.

        Raises:
            ValueError: if not exactly one of the two is given, or its shape, type or a value is impossible;
                if the model cannot stream.
        """
        padding_mask, decoder_past_key_values, scales = of_encodec(
            padding_mask, decoder_past_key_values
        )
        check_scales(scales if audio_scales is None else audio_scales, last_frame_pad_length)
        audio_codes, quantized_latents, padding_mask = of_dac(
            audio_codes,
            quantized_latents,
            quantized_representation,
            padding_mask,
            self.config.codebook_dim,
        )
        given = quantized_latents if audio_codes is None else audio_codes
        batch = given.shape[-3] if isinstance(given, Tensor) and given.ndim >= 3 else None
        check_past("decoder", decoder_past_key_values, AudioPast, batch)
        if padding_mask is not None and audio_codes_mask is not None:
            raise ValueError("decode takes either padding_mask or audio_codes_mask, not both")
        masks = audio_codes_mask if padding_mask is None else padding_mask
        streamed = self._is_streamed(bool(use_cache), decoder_past_key_values, masks)
        if (audio_codes is None) == (quantized_latents is None):
            raise ValueError(
                "decode takes either audio_codes or quantized_latents, exactly one of them"
            )
        if audio_codes is not None:
            audio_codes = without_chunks(integers("audio_codes", audio_codes, running_device(self)))
            check_codes(audio_codes, self.config.num_quantizers, may_be_empty=streamed)
            if not audio_codes.shape[-1]:
                return self._nothing_decoded(audio_codes, decoder_past_key_values)
            quantized_latents = look_up(self.quantizer, audio_codes)
        check_latents(quantized_latents, self.config.codebook_dim)
        if streamed:
            return self._decode_next(quantized_latents, decoder_past_key_values or self._no_past())
        width = None
        if padding_mask is not None:
            hop, frames = self.config.hop_length, quantized_latents.shape[-1]
            lengths, width = decoded_frames(padding_mask, hop, quantized_latents.device)
            if frames != -(-width // hop):
                raise ValueError(
                    f"padding_mask is of {width} samples, which have {-(-width // hop)} codes, and there are "
                    f"{frames}: give the mask of the clips that these codes are of"
                )
            audio_codes_mask = mask_of_clips(lengths, frames)
        mask = self._frame_mask(audio_codes_mask, quantized_latents)
        return SimVQAudioDecoderOutput(self._decode_latents(quantized_latents, mask)[..., :width])

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        audio_codes: Tensor | None = None,
        encoder_past_key_values: None = None,
        decoder_past_key_values: None = None,
        *,
        quantize: bool = True,
        attention_mask: Tensor | None = None,
        n_quantizers: int | None = None,
        bandwidth: float | None = None,
        audio_scales: list | None = None,
    ) -> SimVQAudioOutput:
        """Encode, quantize and decode.

        Args:
            input_values: (B, 1, L) or (B, L) floating point in [-1, 1] at config.sampling_rate.
            padding_mask: (B, L), 1 for samples and 0 for the padding to their right.
            num_quantizers: as of encode.
            audio_codes: (B, q, T), made before: they are decoded, and nothing is encoded.
            encoder_past_key_values, decoder_past_key_values: Mimi's; None here, streams take encode and decode.
            quantize: False decodes the latents as they are (autoencoder warm-up); the codes and the loss
                are still those of the quantizer.
            attention_mask, n_quantizers, bandwidth: as of encode.
            audio_scales: as of decode.

        Raises:
            ValueError: as encode and decode; if neither samples nor codes are given.
        """
        if not (encoder_past_key_values is None and decoder_past_key_values is None):
            raise ValueError("forward takes no past: use encode and decode for streams")
        if isinstance(padding_mask, int):  # DAC's order
            padding_mask, n_quantizers = None, padding_mask
        padding_mask = one_mask(padding_mask, attention_mask)
        if audio_codes is not None:
            quantizers_for(self.config, num_quantizers, n_quantizers, bandwidth)
            decoded = self.decode(
                audio_codes, padding_mask, audio_scales=audio_scales, return_dict=True
            )
            return SimVQAudioOutput(decoded.audio_values, audio_codes)
        if input_values is None:
            raise ValueError("give input_values or audio_codes")
        encoded = self.encode(
            input_values,
            padding_mask,
            num_quantizers,
            n_quantizers=n_quantizers,
            bandwidth=bandwidth,
            return_dict=True,
        )
        latents = encoded.quantized_latents if quantize else encoded.latents
        mask = None if padding_mask is None else self._frame_mask(encoded.audio_codes_mask, latents)
        output = SimVQAudioOutput(
            self._decode_latents(latents, mask),
            encoded.audio_codes,
            encoded.audio_codes_mask,
            encoded.commitment_loss,
            encoded.latents,
        )
        return output

    def _quantize_real(
        self, latents: Tensor, mask: Tensor, count: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize the frames of the clips and leave zeros behind their ends."""
        rows = mask[:, 0]
        quantized, codes, commitment_loss = quantize(self.quantizer, latents.mT[rows], count)
        all_codes = codes.new_zeros(*rows.shape, codes.shape[1])
        all_codes[rows] = codes
        all_codes = all_codes.mT.contiguous()
        everything = torch.zeros_like(latents.mT)
        everything[rows] = quantized
        return everything.mT.contiguous(), all_codes, commitment_loss

    def _decode_latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        latents = latents.to(computing_type(self.decoder.conv_in))
        if mask is not None:
            latents = latents.masked_fill(~mask, 0)
        # Convolutions round differently in different layouts, and a single frame is contiguous in several:
        # forward and decode must give the same waveform.
        latents = latents.clone(memory_format=torch.contiguous_format)
        if (
            self._decoder_chunks is None
            or torch.is_grad_enabled()
            or latents.shape[-1] <= self._decoder_chunks[0]
        ):
            return self.decoder(latents, mask)
        return self._decode_in_chunks(latents, mask)

    def _frame_mask(self, mask: Tensor | None, latents: Tensor) -> Tensor | None:
        if mask is None:
            return None
        batch, _, frames = latents.shape
        mask = torch.as_tensor(mask)
        mask = mask[:, None] if mask.ndim == 2 else mask
        lengths = clip_lengths("audio_codes_mask", mask, (batch, 1, frames), latents.device)
        return None if lengths is None else mask_of_clips(lengths, frames)
