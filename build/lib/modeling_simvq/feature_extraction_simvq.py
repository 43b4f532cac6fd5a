"""Feature extractor of the SimVQ audio tokenizer: ragged clips to one padded batch and its mask."""

import difflib

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging

logger = logging.get_logger(__name__)

# Beyond this, samples were never scaled to [-1, 1].
LOUDEST = 16.0

Clip = np.ndarray | torch.Tensor | list[float] | tuple[float, ...]


class SimVQAudioFeatureExtractor(SequenceFeatureExtractor):
    """Checks mono clips, pads them on the right to one length and masks what is padding.

    Samples are neither resampled nor scaled, as in the paper's protocol (fixture ``data_audio``). Clips are not
    padded to whole tokens either: the model does that itself, clip by clip.

    Args:
        feature_size: channels; the tokenizer is mono, so 1 is the only value.
        sampling_rate: samples per second that the model was trained on.
        padding_value: value of the samples added on the right.
        hop_length: samples per token, as in the model's configuration; ceil(L / hop_length) tokens a clip.
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24_000,
        padding_value: float = 0.0,
        hop_length: int = 320,
        **kwargs,
    ):
        for name, value in (("sampling_rate", sampling_rate), ("hop_length", hop_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(padding_value, bool) or not isinstance(padding_value, (int, float)):
            raise ValueError(f"padding_value must be a number, got {padding_value!r}")
        known = ["feature_size", "sampling_rate", "padding_value", "hop_length"]
        known += ["padding_side", "return_attention_mask"]
        for key in kwargs:  # what is misspelt would be kept and do nothing
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if close and key not in known:
                raise TypeError(f"unexpected keyword argument {key!r}: did you mean {close[0]!r}?")
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        if feature_size != 1:
            raise ValueError(f"feature_size must be 1, the tokenizer is mono; got {feature_size}")
        if self.padding_side != "right":
            raise ValueError(f"padding_side must be 'right', got {self.padding_side!r}")
        self.hop_length = hop_length

    def __call__(
        self,
        raw_audio: Clip | list[Clip] | None = None,
        padding: bool | str | PaddingStrategy | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = None,
        sampling_rate: int | None = None,
        pad_to_multiple_of: int | None = None,
        to_mono: bool = False,
        audio: Clip | list[Clip] | None = None,
    ) -> BatchFeature:
        """One clip or several to model inputs.

        Args:
            raw_audio: a mono clip (L,) or (1, L) of floating-point samples in [-1, 1], clips of one length
                (B, L) or (B, 1, L), or a list of clips of any lengths; arrays, tensors or lists of numbers.
            padding: True or "longest" (the default) pads to the longest clip, "max_length" to `max_length`,
                False not at all.
            truncation: cut clips longer than `max_length`.
            max_length: in samples.
            return_tensors: "pt" or "np"; None leaves lists of arrays.
            sampling_rate: of `raw_audio`, in Hz. Without it a wrong rate goes unnoticed.
            pad_to_multiple_of: of samples.
            to_mono: a clip with two axes holds channels, (C, L) or (L, C), of which the mean is taken; so an
                array (C, L) is one clip.
            audio: another name of `raw_audio`.

        Returns:
            input_values (B, 1, L) float32 and padding_mask (B, L) int64, which is 1 where samples are real.

        Raises:
            ValueError: on another sampling rate, and on a clip that is empty, not mono, not floating-point or
                not finite. It names the clip's index and says what to do.
        """
        if (raw_audio is None) == (audio is None):
            raise ValueError("give the clips as raw_audio or as audio, one of them")
        multiple = pad_to_multiple_of
        if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
            raise ValueError(
                f"pad_to_multiple_of must be a whole number of at least 1, got {multiple!r}"
            )
        self._check_rate(sampling_rate)
        given = _split(audio if raw_audio is None else raw_audio, to_mono)
        clips = [_waveform(clip, index, to_mono) for index, clip in enumerate(given)]
        padded = self.pad(
            BatchFeature({"input_values": clips}),
            padding=True if padding is None else padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        return BatchFeature(
            {
                "input_values": [samples[None] for samples in padded["input_values"]],
                "padding_mask": [mask.astype(np.int64) for mask in padded["attention_mask"]],
            },
            tensor_type=return_tensors,
        )

    def _check_rate(self, rate: int | None) -> None:
        if rate is None:
            logger.warning_once(
                f"{type(self).__name__} was not told the sampling_rate of its input and takes it for "
                f"{self.sampling_rate} Hz: pass sampling_rate, so that a wrong one is noticed."
            )
        elif rate != self.sampling_rate:
            raise ValueError(
                f"the clips have {rate} Hz but the model takes {self.sampling_rate} Hz; resample them: "
                f"soxr.resample(clip, {rate}, {self.sampling_rate})"
            )


def _split(audio, to_mono: bool) -> list:
    """The clips in what was given: itself, or its items."""
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        if audio.ndim < (3 if to_mono else 2):
            return [audio]
        if len(audio) == 0:
            raise ValueError(
                f"got an empty array of shape {tuple(audio.shape)}: there is no clip in it"
            )
        if audio.ndim == 2 and audio.shape[0] > audio.shape[1]:
            raise ValueError(
                f"got one array of shape {tuple(audio.shape)}: are these clips of {audio.shape[1]} samples? "
                "Pass list(audio) then; if they are channels, mix them down with to_mono=True"
            )
        return list(audio)
    if not isinstance(audio, (list, tuple)):
        raise ValueError(
            f"audio must be an array, a tensor or a list, got a {type(audio).__name__}: read files and "
            'unpack data-set rows (row["audio"]["array"]) first'
        )
    if len(audio) == 0:
        raise ValueError("got an empty list: there is no clip in it")
    numbers = np.isscalar(audio[0]) and not isinstance(audio[0], (str, bytes))
    return [audio] if numbers else list(audio)


def _waveform(clip: Clip, index: int, to_mono: bool) -> np.ndarray:
    """A checked clip, (L,) float32."""
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu()
        # numpy knows no bfloat16.
        clip = (clip.float() if clip.is_floating_point() else clip).numpy()
    if not isinstance(clip, (np.ndarray, list, tuple)):
        raise ValueError(f"clip {index} is a {type(clip).__name__}, not an array of samples")
    try:
        array = np.asarray(clip)
    except (ValueError, TypeError) as error:
        raise ValueError(f"clip {index} is not a flat list of numbers: {error}") from error
    if array.size == 0:
        raise ValueError(f"clip {index} is empty")
    if np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"clip {index} holds integers ({array.dtype}), samples must be floating-point in [-1, 1]: "
            f"scale it by {_scaling(array.dtype)}"
        )
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"clip {index} holds {array.dtype}, samples must be floating-point")
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2 and to_mono:
        array = array.mean(axis=int(np.argmin(array.shape)))
    if array.ndim == 2 and not to_mono:
        raise ValueError(
            f"clip {index} has shape {array.shape}, but the tokenizer is mono: pass to_mono=True to mix its "
            "channels down"
        )
    if array.ndim != 1:
        raise ValueError(f"clip {index} must have one axis, got shape {array.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        array = array.astype(np.float32)
    loudest = np.abs(array).max()
    if not np.isfinite(loudest):
        raise ValueError(f"clip {index} has NaN or infinite samples")
    if loudest > LOUDEST:
        logger.warning_once(
            f"samples reach {loudest:g} but should lie in [-1, 1]: integers must be scaled, not only cast"
        )
    return array


def _scaling(dtype: np.dtype) -> str:
    limits = np.iinfo(dtype)
    if limits.min < 0:
        return f"clip / {limits.max + 1}"
    middle = (limits.max + 1) // 2
    return f"(clip - {middle}.0) / {middle}"
