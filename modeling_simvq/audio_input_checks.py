"""Checks of what the audio tokenizer is given: errors name the value and what to do."""

from torch import Tensor


def check_waveforms(input_values: Tensor, look_inside: bool) -> None:
    """Refuse what cannot be waveforms (B, 1, L).

    Args:
        look_inside: at the values too, for which a GPU is waited for.

    Raises:
        ValueError: naming the shape, the type or the value.
    """
    shape = tuple(input_values.shape)
    if input_values.ndim != 3 or shape[1] != 1:
        raise ValueError(
            f"input_values must be (B, 1, L), mono, got shape {shape}: "
            "mix channels down, and let SimVQAudioFeatureExtractor prepare the clips"
        )
    if input_values.numel() == 0:
        raise ValueError(f"input_values is empty: shape {shape}")
    if not input_values.is_floating_point():
        raise ValueError(
            f"input_values must be floating point in [-1, 1], got {input_values.dtype}: "
            "divide 16-bit samples by 32768"
        )
    if look_inside and not input_values.isfinite().all():
        raise ValueError("input_values holds NaN or infinite values")


def check_latents(latents: Tensor, width: int) -> None:
    """Refuse what cannot be vectors of codes (B, d, T).

    Raises:
        ValueError: naming the shape or the type.
    """
    if latents.ndim != 3 or latents.shape[1] != width or latents.numel() == 0:
        raise ValueError(
            f"quantized_latents must be (B, {width}, T) and not empty, got shape {tuple(latents.shape)}"
        )
    if not latents.is_floating_point():
        raise ValueError(f"quantized_latents must be floating point, got {latents.dtype}")


def check_codes(audio_codes: Tensor, most: int = 1, may_be_empty: bool = False) -> None:
    """Refuse what cannot be codes (B, q, T).

    Args:
        most: quantizers of the model, and so of q.

    Raises:
        ValueError: naming the shape.
    """
    shape = tuple(audio_codes.shape)
    wanted = "(B, 1, T)" if most == 1 else f"(B, q, T), q up to {most},"
    known = audio_codes.ndim == 3 and 1 <= shape[1] <= most
    if not known or (audio_codes.numel() == 0 and not may_be_empty):
        raise ValueError(f"audio_codes must be {wanted} and not empty, got shape {shape}")
