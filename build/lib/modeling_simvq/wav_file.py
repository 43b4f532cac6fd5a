"""WAV files of PCM, by the standard library alone."""

import io
import wave
from pathlib import Path

import torch
from torch import Tensor

_FRAMES_AT_ONCE = 1 << 16


def read_wav(path: Path) -> tuple[Tensor, int, int]:
    """Read a WAV file of 8 to 32-bit PCM; return samples (1, 1, L) in [-1, 1], their rate, its channels.

    Raises:
        ValueError: if it is missing, damaged, empty or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: name a recording, a WAV file")
    return samples_of_wav(path.read_bytes(), str(path))


def samples_of_wav(file_content: bytes, name: str) -> tuple[Tensor, int, int]:
    """Return samples (1, 1, L), rate and channels of a WAV file's content, as read_wav.

    Args:
        name: of the file, for messages.

    Raises:
        ValueError: if it is damaged, empty or of another format.
    """
    try:
        with wave.open(io.BytesIO(file_content), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = bytearray()
            # In pieces: what was written to a pipe declares more than there is.
            while part := file.readframes(_FRAMES_AT_ONCE):
                content += part
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{name} is damaged or no WAV file of PCM ({str(error) or 'it ends too early'}): "
            f"{conversion(name)}"
        ) from error
    if width not in (1, 2, 3, 4):
        raise ValueError(f"{name} has {8 * width}-bit samples: {conversion(name)}")
    del content[len(content) - len(content) % (width * channels) :]
    if not content:
        raise ValueError(f"{name} holds no samples")
    samples = _pcm_to_float(content, width).view(-1, channels).mean(dim=1)
    return samples.float()[None, None], rate, channels


def _pcm_to_float(content: bytearray, width: int) -> Tensor:
    """PCM of `width` bytes a sample to float64 in [-1, 1)."""
    if width == 1:  # the only one without a sign
        return (torch.frombuffer(content, dtype=torch.uint8).double() - 128) / 128
    if width == 3:
        low, middle, high = torch.frombuffer(content, dtype=torch.uint8).view(-1, 3).int().unbind(1)
        values = low + (middle << 8) + (((high ^ 128) - 128) << 16)
    else:
        values = torch.frombuffer(content, dtype=torch.int16 if width == 2 else torch.int32)
    return values.double() / 2 ** (8 * width - 1)


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """Write samples (L,) in [-1, 1] as 16-bit PCM, mono; louder ones are clipped."""
    path.write_bytes(wav_of_samples(samples, rate))


def wav_of_samples(samples: Tensor, rate: int) -> bytes:
    """Return the content of the file that write_wav writes."""
    values = (samples.clamp(-1, 1) * 32767).round().to(torch.int16)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.numpy().tobytes())
    return content.getvalue()


def conversion(path: Path | str, rate: int | None = None) -> str:
    """Name a command that makes a file that fits."""
    rates = f" -ar {rate}" if rate else ""
    return (
        f'convert it first, for example with ffmpeg -i "{path}"{rates} -c:a pcm_s16le converted.wav'
    )
