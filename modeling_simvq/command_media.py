"""Images and recordings of a command: files to what a tokenizer takes, codes, and back to files."""

import io
import warnings
from collections.abc import Hashable

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .clip_lengths import mask_of_clips
from .code_file import Codes
from .command_model import Tokenizer
from .wav_file import conversion, samples_of_wav, wav_of_samples


class Images:
    """Images of any size, in and out as RGB."""

    read_suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
    made = ".png"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def read(self, content: bytes, name: str) -> tuple[Tensor, dict[str, int]]:
        """Return pixel values (3, H, W), padded to whole codes, and height and width before that.

        Raises:
            ValueError: if it is no image, or too large or small a one.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(content))
                image.load()
            whole = {"do_resize": False, "do_center_crop": False}
            values = self.tokenizer.processor(image, return_tensors="pt", **whole)["pixel_values"][
                0
            ]
        except UnidentifiedImageError as error:
            raise ValueError("it is no image that Pillow knows") from error
        except (OSError, SyntaxError, Warning, Image.DecompressionBombError) as error:
            raise ValueError(f"it cannot be read as an image: {error}") from error
        # Upright, as the processor turns it.
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        height, width = image.size if turned else image.size[::-1]
        return values, {"height": height, "width": width}

    def group(self, values: Tensor) -> Hashable:
        """Only images of one shape share a batch."""
        return values.shape

    @torch.inference_mode()
    def encode(self, batch: list[Tensor]) -> list[Tensor]:
        """Return the codes of each image, (h, w), or (Q, h, w) of several quantizers."""
        model = self.tokenizer.model
        return list(model.encode(torch.stack(batch).to(model.device)).image_codes.cpu())

    def decoding_group(self, codes: Codes) -> Hashable:
        """Only codes of one shape share a batch."""
        return codes.codes.shape

    @torch.inference_mode()
    def decode(self, batch: list[Codes]) -> list[bytes]:
        """Return a PNG file of each image."""
        codes = torch.stack([torch.from_numpy(one.codes.astype("int64")) for one in batch])
        several = self.tokenizer.model.config.num_quantizers > 1
        if codes.ndim != 3 + several:
            wanted = "(q, h, w)" if several else "(h, w)"
            raise ValueError(
                f"codes of shape {tuple(codes.shape[1:])} are not an image's, {wanted}"
            )
        model = self.tokenizer.model
        values = model.decode(image_codes=codes.to(model.device)).pixel_values
        sizes = [(one.sizes["height"], one.sizes["width"]) for one in batch]
        files = []
        for image in self.tokenizer.processor.post_process(values, sizes):
            content = io.BytesIO()
            image.save(content, "PNG")
            files.append(content.getvalue())
        return files


class Recordings:
    """Mono recordings; channels are mixed down, other rates resampled."""

    read_suffixes = (".wav", ".flac", ".ogg", ".mp3", ".opus")
    made = ".wav"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def read(self, content: bytes, name: str) -> tuple[Tensor, dict[str, int]]:
        """Return samples (L,) at the model's rate, and their number and rate.

        Raises:
            ValueError: if it is no recording, or needs a package that is not installed.
        """
        rate = self.tokenizer.model.config.sampling_rate
        samples, found = self._samples(content, name)
        if found != rate:
            try:
                import soxr
            except ImportError:
                raise ValueError(
                    f"it has {found:,} samples a second and the model takes {rate:,}: pip install soxr, or "
                    f"{conversion(name, rate)}"
                ) from None
            samples = torch.from_numpy(soxr.resample(samples.numpy(), found, rate))
        if not len(samples):
            raise ValueError("it holds no samples")
        return samples, {"samples": len(samples), "sampling_rate": rate}

    def _samples(self, content: bytes, name: str) -> tuple[Tensor, int]:
        try:
            samples, rate, _ = samples_of_wav(content, name)
            return samples[0, 0], rate
        except ValueError as error:
            try:
                import soundfile
            except ImportError:
                raise ValueError(f"{error}; or pip install soundfile") from None
        try:
            values, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise ValueError(f"it cannot be read as a recording: {error}") from error
        return torch.from_numpy(values).mean(dim=1), rate

    def group(self, values: Tensor) -> Hashable:
        """Any clips share a batch."""
        return None

    @torch.inference_mode()
    def encode(self, batch: list[Tensor]) -> list[Tensor]:
        """Return the codes of each clip, (T,), or (Q, T) of several quantizers."""
        model, rate = self.tokenizer.model, self.tokenizer.model.config.sampling_rate
        inputs = self.tokenizer.processor(batch, sampling_rate=rate, return_tensors="pt")
        made = model.encode(**inputs.to(model.device))
        pairs = zip(made.audio_codes.cpu(), made.audio_codes_mask.cpu(), strict=True)
        clips = [codes[:, mask[0]] for codes, mask in pairs]
        return [codes[0] for codes in clips] if model.config.num_quantizers == 1 else clips

    def decoding_group(self, codes: Codes) -> Hashable:
        """Clips of as many quantizers share a batch."""
        return codes.codes.shape[:-1]

    @torch.inference_mode()
    def decode(self, batch: list[Codes]) -> list[bytes]:
        """Return a WAV file of each clip."""
        model = self.tokenizer.model
        rows = [torch.from_numpy(one.codes.astype("int64")) for one in batch]
        several = model.config.num_quantizers > 1
        if any(row.ndim != 1 + several for row in rows):
            wanted = "(q, T)" if several else "(T,)"
            raise ValueError(f"codes of shape {tuple(rows[0].shape)} are not a clip's, {wanted}")
        # Time first while they are padded.
        frames = [row.reshape(-1, row.shape[-1]).T for row in rows]
        codes = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True).mT
        lengths = torch.tensor([len(row) for row in frames])
        mask = mask_of_clips(lengths, codes.shape[-1])
        made = model.decode(codes.to(model.device), audio_codes_mask=mask).audio_values
        made = made[:, 0].float().cpu()
        if not made.isfinite().all():
            raise ValueError("the model's audio holds values that are not finite")
        rate = model.config.sampling_rate
        counts = [one.sizes["samples"] for one in batch]
        return [wav_of_samples(row[:count], rate) for row, count in zip(made, counts, strict=True)]


def media_of(tokenizer: Tokenizer) -> Images | Recordings:
    """Return what a tokenizer is for."""
    kind = Recordings if hasattr(tokenizer.model.config, "sampling_rate") else Images
    return kind(tokenizer)
