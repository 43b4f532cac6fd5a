"""Arguments of DAC, EnCodec and Mimi: taken where they mean the same, refused by name where they cannot."""

import math

from torch import Tensor

from .clip_lengths import clip_lengths, mask_of_clips


def check_bits(
    config, num_quantizers: int | None, n_quantizers: int | None, bandwidth: float | None
) -> None:
    """Refuse other amounts of bits than the model's single codebook gives.

    Args:
        num_quantizers: of Mimi.
        n_quantizers: of DAC.
        bandwidth: of EnCodec, in kbit a second.

    Raises:
        ValueError: naming what the model has.
    """
    for name, value in (("num_quantizers", num_quantizers), ("n_quantizers", n_quantizers)):
        if value is not None and value != 1:
            raise ValueError(
                f"{name} must be 1 or left out, got {value}: this model has one codebook, of "
                f"{config.codebook_size:,} codes"
            )
    own = config.frame_rate * math.log2(config.codebook_size) / 1000
    if bandwidth is not None and not math.isclose(bandwidth, own, rel_tol=0.01):
        raise ValueError(
            f"bandwidth must be left out, got {bandwidth}: this model has one codebook and always gives "
            f"{own:.3g} kbit a second"
        )


def one_mask(padding_mask, attention_mask):
    """Return the mask of samples under whichever name it came.

    Raises:
        ValueError: if both are given.
    """
    if padding_mask is not None and attention_mask is not None:
        raise ValueError("padding_mask and attention_mask are the same here: give one of them")
    return attention_mask if padding_mask is None else padding_mask


def with_channel(input_values: Tensor) -> Tensor:
    """Return waveforms (B, L) or (B, 1, L) as (B, 1, L)."""
    return input_values[:, None] if input_values.ndim == 2 else input_values


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
    """Return mask and past of a decode whose arguments came in EnCodec's order: codes, scales, mask."""
    if isinstance(padding_mask, (list, tuple)) and all(part is None for part in padding_mask):
        return (past, None) if isinstance(past, Tensor) else (None, past)
    return padding_mask, past


def check_past(name: str, past, kind: type) -> None:
    """Refuse a past that is none of this model's.

    Raises:
        ValueError: naming the argument.
    """
    if past is not None and not isinstance(past, kind):
        raise ValueError(
            f"{name} must come from this model's output for the chunk before, got a {type(past).__name__}"
            ": give masks by name (padding_mask=...)"
        )


def check_scales(audio_scales) -> None:
    """Refuse EnCodec's scales, unless there are none: a list of None.

    Raises:
        ValueError: saying what to do.
    """
    if audio_scales is not None and any(scale is not None for scale in audio_scales):
        raise ValueError(
            "audio_scales must be left out: this model normalises no loudness and has no scales"
        )


def decoded_frames(padding_mask, count: int, hop: int, device) -> Tensor:
    """Return the frames of each clip, (B,), of a mask of samples (B, L); at most `count`."""
    mask = without_channel(padding_mask)
    batch, width = mask.shape
    lengths = clip_lengths("padding_mask", mask, (batch, width), device)
    if lengths is None:
        lengths = mask.new_full((batch,), width).long().to(device)
    return (-(-lengths // hop)).clamp(max=count)


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
        count = self.get_encoded_length(padding_mask.shape[-1])
        lengths = decoded_frames(padding_mask, count, self.config.hop_length, padding_mask.device)
        return mask_of_clips(lengths, count)[:, 0]
