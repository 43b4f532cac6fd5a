"""Arguments of DAC, EnCodec and Mimi: taken where they mean the same, refused by name where they cannot."""

import math

import numpy as np
import torch
from torch import Tensor

from .clip_lengths import clip_lengths, mask_of_clips


def quantizers_for(
    config, num_quantizers: int | None, n_quantizers: int | None, bandwidth: float | None
) -> int | None:
    """Return how many quantizers to use, by any of three names; None for all, or what training draws.

    Args:
        num_quantizers: of Mimi.
        n_quantizers: of DAC.
        bandwidth: of EnCodec, in kbit a second, to 1 %.

    Raises:
        ValueError: naming what the model has.
    """
    most, found = config.num_quantizers, None
    for name, value in (("num_quantizers", num_quantizers), ("n_quantizers", n_quantizers)):
        if value is None:
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 1 <= value <= most:
            has = (
                f"{most} codebooks"
                if most > 1
                else f"one codebook, of {config.codebook_size:,} codes"
            )
            limit = "1" if most == 1 else f"1 to {most}"
            raise ValueError(
                f"{name} must be {limit} or left out, got {value!r}: this model has {has}"
            )
        if found not in (None, value):
            raise ValueError(f"num_quantizers={found} and n_quantizers={value} differ: give one")
        found = int(value)
    if bandwidth is None:
        return found
    known = isinstance(bandwidth, (int, float, np.integer, np.floating))
    rates = config.target_bandwidths
    fits = [
        i + 1 for i, own in enumerate(rates) if known and math.isclose(bandwidth, own, rel_tol=0.01)
    ]
    if not fits or found not in (None, fits[0]):
        also = ", or fit num_quantizers" if found else ""
        raise ValueError(
            f"bandwidth must be left out{also}, got {bandwidth}: this model gives "
            f"{' or '.join(f'{rate:.3g}' for rate in rates)} kbit a second"
        )
    return fits[0]


def one_mask(padding_mask, attention_mask):
    """Return the mask of samples under whichever name it came.

    Raises:
        ValueError: if both are given.
    """
    if padding_mask is not None and attention_mask is not None:
        raise ValueError("padding_mask and attention_mask are the same here: give one of them")
    return attention_mask if padding_mask is None else padding_mask


def with_channel(input_values) -> Tensor:
    """Return waveforms (B, L) or (B, 1, L), a tensor, an array or a list, as a tensor (B, 1, L).

    Raises:
        ValueError: if they are something else.
    """
    try:
        values = torch.as_tensor(input_values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"input_values must be a tensor of samples: {error}") from error
    return values[:, None] if values.ndim == 2 else values


def without_channel(mask):
    """Return a mask (B, 1, L), as EnCodec has it, as (B, L)."""
    return mask[:, 0] if getattr(mask, "ndim", 0) == 3 and mask.shape[1] == 1 else mask


def without_chunks(audio_codes: Tensor) -> Tensor:
    """Return codes with EnCodec's leading axis of chunks, (1, B, 1, T), as (B, 1, T).

    Raises:
        ValueError: if there are several chunks.
    """
    if audio_codes.ndim != 4:
        return audio_codes
    if len(audio_codes) != 1:
        raise ValueError(
            f"audio_codes has {len(audio_codes)} chunks, shape {tuple(audio_codes.shape)}: this model has no "
            "chunks; join them along the last axis, or decode one after the other"
        )
    return audio_codes[0]


def of_encodec(padding_mask, past) -> tuple:
    """Return mask, past and scales of a decode that may have EnCodec's order: codes, scales, mask."""
    is_scales = isinstance(padding_mask, (list, tuple)) and not any(
        isinstance(part, (int, float, list, tuple)) for part in padding_mask
    )
    if is_scales or (isinstance(past, Tensor) and padding_mask is not None):
        return (
            (past, None, padding_mask) if isinstance(past, Tensor) else (None, past, padding_mask)
        )
    return padding_mask, past, None


def of_dac(audio_codes, latents, representation, padding_mask, width: int) -> tuple:
    """Return codes, latents and mask of a decode, whose arguments may be in DAC's order: vectors, codes.

    Args:
        width: d, of vectors.
    """
    vectors = isinstance(audio_codes, Tensor) and audio_codes.is_floating_point()
    if vectors and audio_codes.ndim == 3 and audio_codes.shape[1] == width:
        audio_codes, representation = None, audio_codes
    if (
        latents is None
        and padding_mask is not None
        and audio_codes is None
        and representation is None
    ):
        audio_codes, padding_mask = padding_mask, None
    if audio_codes is not None:  # which win, as in DAC
        return audio_codes, latents, padding_mask
    return None, representation if latents is None else latents, padding_mask


def check_past(side: str, past, kind: type, batch: int | None, quantizers: int) -> None:
    """Refuse a past that is none of this model's encoder or decoder, or of other streams.

    Args:
        side: "encoder" or "decoder".
        batch: B, of the chunk, if it is known.
        quantizers: Q of this model.

    Raises:
        ValueError: naming the argument.
    """
    if past is None:
        return
    name = f"{side}_past_key_values"
    if not isinstance(past, kind):
        raise ValueError(
            f"{name} must come from this model's output for the chunk before, got a {type(past).__name__}"
            ": give masks by name (padding_mask=...)"
        )
    if any(not layer.startswith(side) for layer in past.layers):
        raise ValueError(f"{name} is the other side's: give it what the {side}'s own output holds")
    if past.books and len(past.books) != quantizers:
        raise ValueError(
            f"{name} is of a model of {len(past.books)} quantizers, this one has {quantizers}"
        )
    sizes = [
        len(value)
        for layer, value in past.layers.items()
        if layer.endswith(("conv_in", "conv_out"))
    ]
    if sizes and batch is not None and sizes[0] != batch:
        raise ValueError(f"{name} is of {sizes[0]} streams, and the chunk of {batch}")


def check_scales(audio_scales, last_frame_pad_length: int | None = 0) -> None:
    """Refuse EnCodec's scales and its padding of chunks, unless there are none: a list of None, and 0.

    Raises:
        ValueError: saying what to do.
    """
    some = audio_scales is not None and any(scale is not None for scale in audio_scales)
    if some or last_frame_pad_length:
        raise ValueError(
            f"{'audio_scales' if some else 'last_frame_pad_length'} must be left out: this model normalises "
            "no loudness and has no chunks"
        )


def decoded_frames(padding_mask, hop: int, device=None) -> tuple[Tensor, int]:
    """Return the frames of each clip, (B,), of a mask of samples (B, L); and L.

    Raises:
        ValueError: if it is no such mask.
    """
    mask = without_channel(torch.as_tensor(padding_mask))
    if mask.ndim != 2:
        raise ValueError(f"padding_mask must be (B, L), got shape {tuple(mask.shape)}")
    batch, width = mask.shape
    lengths = clip_lengths("padding_mask", mask, (batch, width), device)
    if lengths is None:
        lengths = torch.full((batch,), width, device=device or mask.device)
    return -(-lengths // hop), width


class CountsFrames:
    """Part of the audio model that tells how many codes a clip has, by Mimi's names. Uses its `config`."""

    def get_encoded_length(self, input_length: Tensor | int) -> Tensor | int:
        """Return the number of codes of a clip of so many samples."""
        return -(-input_length // self.config.hop_length)

    def get_audio_codes_mask(self, padding_mask: Tensor, padding_side: str = "right") -> Tensor:
        """Return which codes are real, (B, T) bool, of a mask of samples (B, L).

        Raises:
            ValueError: if the padding is not on the right.
        """
        if padding_side != "right":
            raise ValueError(
                f"padding_side must be 'right', got {padding_side!r}: pad on the right"
            )
        lengths, width = decoded_frames(padding_mask, self.config.hop_length)
        return mask_of_clips(lengths, self.get_encoded_length(width))[:, 0]
