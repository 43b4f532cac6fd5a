"""Parts of a tokenizer that exporters take: modules of one tensor to one, in operations that every engine has.

    program = traced(exportable(model, "encoder"), model, "encoder")

The model itself has what graphs cannot hold: checks, caches, an LSTM that is unrolled to the length of its
example, and complex numbers. Here the codebook is a constant, the LSTM a loop, and the inverse STFT real.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.export import Dim
from transformers import PreTrainedModel

from .lstm import LSTM, next_cell
from .nearest_code import nearest_code
from .quantization_simvq import SimVQ
from .several_quantizers import SeveralQuantizers

PARTS = ("encoder", "decoder")
# Bounds that torch.export checks a graph for; other engines do not know them.
MOST_ROWS, MOST_TOKENS, MOST_FRAMES = 4096, 4096, 1_000_000
# The encoder's last convolution pads three frames by reflection, and its graph takes no shorter clips.
LEAST_FRAMES = 7


def exportable(model: PreTrainedModel, part: str) -> nn.Module:
    """Return a part of a tokenizer as a module for exporters. The model is copied, not changed.

    Args:
        model: SimVQImageModel or SimVQAudioModel.
        part: "encoder", pixel_values (B, 3, H, W) to image_codes (B, h, w) or input_values (B, 1, L) to
            audio_codes (B, 1, T); "decoder", codes to pixel_values or audio_values.

    Returns:
        Module whose forward takes one tensor, in float32. Height and width are multiples of the
        down-sampling factor; a clip has at least LEAST_FRAMES frames, and its last one is filled with silence.

    Raises:
        ValueError: if there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    model = copy.deepcopy(model).eval().float().requires_grad_(False)
    model.quantizer = _with_fixed_codebooks(model.quantizer)
    if not is_audio(model):
        model.disable_tiling()
        _leave_out(model, part)
        return Part(model, part)
    model.disable_chunking()
    model.remove_weight_norm()
    if model.encoder.lstm is not None:
        model.encoder.lstm = LoopedLSTM(model.encoder.lstm)
    model.decoder.inverse_stft = RealInverseSTFT(model.config.n_fft, model.config.hop_length)
    _leave_out(model, part)
    return Part(model, part)


def _with_fixed_codebooks(quantizer: nn.Module) -> nn.Module:
    if isinstance(quantizer, SeveralQuantizers):
        quantizer.levels = nn.ModuleList(_with_fixed_codebooks(level) for level in quantizer.levels)
    return FixedCodebook(quantizer.codebook()) if isinstance(quantizer, SimVQ) else quantizer


def _leave_out(model: PreTrainedModel, part: str) -> None:
    """Drop the weights of the other part, but for the layer whose type says how the model computes."""
    other = "decoder" if part == "encoder" else "encoder"
    rest = nn.Module()
    rest.conv_in = getattr(model, other).conv_in
    setattr(model, other, rest)


def is_audio(model: PreTrainedModel) -> bool:
    """Return whether a tokenizer is one of audio."""
    return model.main_input_name == "input_values"


def example(model: PreTrainedModel, part: str, rows: int = 2, tokens: int = 10) -> Tensor:
    """Return an input of a part to trace it with: two images or clips of different height and width."""
    config = model.config
    several = config.num_quantizers
    if is_audio(model):
        if part == "decoder":
            return _codes_of_example(config.codebook_size, (rows, several, tokens))
        noise = torch.rand(
            rows, 1, tokens * config.hop_length, generator=torch.Generator().manual_seed(0)
        )
        return 0.2 * noise - 0.1
    height, width = tokens, tokens + 2
    if part == "decoder":
        levels = () if several == 1 else (several,)
        return _codes_of_example(config.codebook_size, (rows, *levels, height, width))
    factor = config.downsample_factor
    size = (rows, config.in_channels, height * factor, width * factor)
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _codes_of_example(codebook_size: int, shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape) % codebook_size


def dynamic_shapes(
    model: PreTrainedModel, part: str, batched: bool = True, most: int | None = None
) -> dict[int, Dim]:
    """Return the axes of a part's input whose sizes may differ from the example's.

    Args:
        batched: the batch may. Otherwise it is one, and clips are of whole frames: some engines need that.
        most: tokens a side, or frames of a clip, at most: some engines set memory apart for them.
    """
    config, batch = model.config, {0: Dim("batch", min=1, max=MOST_ROWS)} if batched else {}
    if is_audio(model):
        frames = Dim("frames", min=LEAST_FRAMES, max=most or MOST_FRAMES)
        if part == "decoder":
            return batch | {2: frames}
        hop = config.hop_length
        least = (LEAST_FRAMES - 1) * hop + 1
        samples = Dim("samples", min=least, max=(most or MOST_FRAMES) * hop)
        return batch | {2: samples if batched else hop * frames}
    height, width = (Dim(name, min=2, max=most or MOST_TOKENS) for name in ("height", "width"))
    if part == "decoder":
        first = 1 if config.num_quantizers == 1 else 2
        return batch | {first: height, first + 1: width}
    factor = config.downsample_factor
    return batch | {2: factor * height, 3: factor * width}


def traced(
    module: nn.Module,
    model: PreTrainedModel,
    part: str,
    batched: bool = True,
    most: int | None = None,
) -> torch.export.ExportedProgram:
    """Trace a part that `exportable` made of a model; the rest as of dynamic_shapes.

    With `most` the example is as large: ExecuTorch sets memory apart for it where it loses sight of the bound.

    Raises:
        ValueError: if torch.export cannot trace the model for any size.
    """
    size = {} if most is None else {"tokens": most - 2}  # an image is two tokens wider than high
    try:
        with torch.no_grad():
            return torch.export.export(
                module,
                (example(model, part, rows=2 if batched else 1, **size),),
                dynamic_shapes=(dynamic_shapes(model, part, batched, most),),
                strict=False,
            )
    except torch._dynamo.exc.UserError as error:
        raise ValueError(
            f"torch.export cannot trace this {part} for any size: {str(error).splitlines()[0]}"
        ) from error


def input_and_output(model: PreTrainedModel, part: str) -> tuple[str, str]:
    """Return the names of what a part takes and gives."""
    kind = "audio" if is_audio(model) else "image"
    if part == "encoder":
        return model.main_input_name, f"{kind}_codes"
    return f"{kind}_codes", "audio_values" if is_audio(model) else "pixel_values"


def run_part(model: PreTrainedModel, part: str, values: Tensor) -> Tensor:
    """Run a part of the model itself: values to codes, or codes to values."""
    output = model.encode(values) if part == "encoder" else model.decode(values)
    return getattr(output, input_and_output(model, part)[1])


class Part(nn.Module):
    """Encoder or decoder of a tokenizer, of one tensor to one."""

    def __init__(self, model: PreTrainedModel, part: str):
        super().__init__()
        self.model, self.part = model, part

    def forward(self, values: Tensor) -> Tensor:
        if self.part == "encoder" and is_audio(self.model):
            # Whole frames in the graph's own terms: every layer's length is then a multiple of their number.
            hop, samples = self.model.config.hop_length, values.shape[-1]
            frames = (samples + hop - 1) // hop
            values = F.pad(values, (0, frames * hop - samples))
        return run_part(self.model, self.part, values)


class FixedCodebook(nn.Module):
    """Quantizer whose codes (K, d) are constants of the graph."""

    def __init__(self, codes: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize, as Quantizer.forward does, without a loss."""
        batch, _, *spatial = latents.shape
        rows = latents.float().flatten(2).mT.flatten(0, 1)
        codes = nearest_code(rows, self.codes).view(batch, *spatial)
        return self.lookup(codes), codes, latents.new_zeros(())

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes, as Quantizer.lookup does."""
        return F.embedding(codes, self.codes).movedim(-1, 1).contiguous()


class LoopedLSTM(nn.Module):
    """LSTM of any number of frames, from silence, as a loop of the graph: exporters unroll nn.LSTM."""

    def __init__(self, lstm: LSTM):
        super().__init__()
        self.num_layers, self.width = lstm.num_layers, lstm.hidden_size
        self.weights = nn.ParameterList(lstm._flat_weights)

    def forward(self, rows: Tensor, state: None) -> tuple[Tensor, None]:
        """(B, T, C) to (B, T, C)."""
        hidden = rows.mT
        for layer in range(self.num_layers):
            hidden = self._layer(hidden, *self.weights[4 * layer : 4 * layer + 4])
        return hidden.mT, None

    def _layer(
        self, hidden: Tensor, into: Tensor, again: Tensor, bias_in: Tensor, bias_again: Tensor
    ) -> Tensor:
        # A convolution of width 1: a linear layer would flatten the batch, whose size is not known.
        gates = F.conv1d(hidden, into[..., None], bias_in + bias_again)
        silence = torch.zeros_like(gates[:, : self.width, 0])

        def step(state: tuple[Tensor, Tensor], now: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            output, cell = state
            output, cell = next_cell(now + output @ again.T, cell)
            return (output, cell), output.clone()

        _, outputs = scan(step, (silence, silence.clone()), gates.movedim(2, 0).contiguous())
        return outputs.movedim(0, 2).contiguous()


class RealInverseSTFT(nn.Module):
    """Inverse STFT without complex numbers: one transposed convolution whose kernels are windowed waves.

    Equal to InverseSTFT to 1e-6 of the loudest sample.
    """

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.hop_length, self.lag = hop_length, (n_fft - hop_length) // 2
        bins, times = torch.arange(n_fft // 2 + 1), torch.arange(n_fft)
        # Whole turns are taken off while they are integers.
        angle = (bins[:, None] * times % n_fft).double() * (2 * math.pi / n_fft)
        # A real signal's spectrum has every bin twice but for the first and, of an even n_fft, the last.
        twice = torch.full((len(bins), 1), 2.0, dtype=torch.float64)
        twice[0] = 1
        if n_fft % 2 == 0:
            twice[-1] = 1
        window = torch.hann_window(n_fft, dtype=torch.float32).double()
        waves = torch.cat([angle.cos() * twice, -angle.sin() * twice]) * window / n_fft
        self.register_buffer("waves", waves[:, None].float())
        self.register_buffer("squares", window.square()[None, None].float())

    def forward(self, magnitude: Tensor, phase: Tensor, mask: None) -> Tensor:
        """Two of (B, n_fft / 2 + 1, T) to (B, T * hop)."""
        spectrum = torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1)
        waveform = self._overlap_add(spectrum, self.waves)
        windows = self._overlap_add(magnitude.new_ones(1, 1, magnitude.shape[-1]), self.squares)
        return (waveform / windows.clamp(min=1e-11))[:, 0]

    def _overlap_add(self, frames: Tensor, kernels: Tensor) -> Tensor:
        summed = F.conv_transpose1d(frames, kernels, stride=self.hop_length)
        return summed[..., self.lag : summed.shape[-1] - self.lag]
