"""Samples for a card: what the model makes of a few images or of one recording."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image
from transformers import PreTrainedModel

from hub_cards.sheets import from_pil, image_sheet, spectrogram_sheet
from hub_cards.user_error import UserError
from modeling_simvq.image_processing_simvq import pil_to_rgb, upright

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SOUND_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
MOST_PICTURES = 4
MOST_SECONDS = 10
# A sentence of LibriTTS test-clean (CC BY 4.0, see training/demo/speech/README.md).
SPEECH = Path(__file__).resolve().parent / "speech_sample.flac"


class SamplesError(UserError):
    """Samples cannot be read, or there are none."""


def write_samples(
    model: PreTrainedModel, processor, given: Path | None, folder: Path
) -> tuple[list[Path], list[str]]:
    """Reconstruct samples and write them to a folder.

    Args:
        model, processor: as the Auto classes load them.
        given: a file, or a folder of which the first files are taken; by default photographs that come
            with scikit-image, or the sentence beside this file.
        folder: for images reconstructions.png is written to it; for audio original.wav,
            reconstruction.wav and spectrograms.png.

    Returns:
        The files written, and the names of the samples.

    Raises:
        SamplesError: if there are none, one cannot be read, or the model makes something that is not
            finite of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.config.model_type == "simvq_image":
        pictures = _pictures(given)
        return [_write_pictures(model, processor, pictures, folder)], list(pictures)
    name, sound = _sound(given, model.config.sampling_rate)
    return _write_sound(model, processor, name, sound, folder), [name]


def _files(given: Path, suffixes: set[str], most: int) -> list[Path]:
    if not given.exists():
        raise SamplesError(f"there is no sample {given}")
    files = sorted(given.iterdir()) if given.is_dir() else [given]
    files = [path for path in files if path.suffix.lower() in suffixes][:most]
    if not files:
        raise SamplesError(
            f"{given} holds no sample: expected one of {', '.join(sorted(suffixes))}"
        )
    return files


def _pictures(given: Path | None) -> dict[str, Image.Image]:
    if given is None:
        try:
            from skimage import data  # the images lie inside the package
        except ImportError:
            raise SamplesError(
                "name images for the card with --samples: those of scikit-image are not installed"
            ) from None
        return {
            name: Image.fromarray(getattr(data, name)())
            for name in ("astronaut", "chelsea", "coffee")
        }
    pictures = {}
    for path in _files(given, PICTURE_SUFFIXES, MOST_PICTURES):
        try:
            # Formats that suffixes promise, and no others: Pillow hands PostScript to another program.
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
                picture.load()
                pictures[path.name] = pil_to_rgb(upright(picture))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SamplesError(f"cannot read the image {path}: {error}") from error
    return pictures


def _write_pictures(model, processor, pictures: dict[str, Image.Image], folder: Path) -> Path:
    inputs = processor(list(pictures.values()), return_tensors="pt")
    with torch.inference_mode():
        codes = model.encode(inputs.pixel_values).image_codes
        decoded = model.decode(image_codes=codes).pixel_values
    if not decoded.isfinite().all():
        raise SamplesError("the model's reconstruction is not finite")
    rows = [processor.post_process(values) for values in (inputs.pixel_values, decoded)]
    gap = max(2, rows[0][0].width // 32)
    sheet = image_sheet(from_pil([*rows[0], *rows[1]]), len(pictures), gap, border=False)
    path = folder / "reconstructions.png"
    save_image(sheet, path)
    return path


def _sound(given: Path | None, sampling_rate: int) -> tuple[str, np.ndarray]:
    import soundfile
    import soxr

    path = _files(given or SPEECH, SOUND_SUFFIXES, 1)[0]
    try:
        with soundfile.SoundFile(path) as recording:
            rate = recording.samplerate
            sound = recording.read(MOST_SECONDS * rate, dtype="float32", always_2d=True).mean(
                axis=1
            )
    except (soundfile.SoundFileError, OSError) as error:
        raise SamplesError(f"cannot read the recording {path}: {error}") from error
    if not len(sound) or not np.isfinite(sound).all():
        raise SamplesError(f"the recording {path} is empty or not finite")
    return path.name, soxr.resample(sound, rate, sampling_rate).astype(np.float32)


def _write_sound(model, extractor, name: str, sound: np.ndarray, folder: Path) -> list[Path]:
    import soundfile

    rate = model.config.sampling_rate
    inputs = extractor(sound, sampling_rate=rate, return_tensors="pt")
    with torch.inference_mode():
        codes = model.encode(**inputs).audio_codes
        decoded = model.decode(codes).audio_values[0, 0, : len(sound)].numpy()
    if not np.isfinite(decoded).all():
        raise SamplesError("the model's reconstruction is not finite")
    decoded = decoded.clip(-1, 1)
    paths = [folder / "original.wav", folder / "reconstruction.wav", folder / "spectrograms.png"]
    for path, waveform in zip(paths[:2], (sound, decoded), strict=True):
        soundfile.write(path, waveform, rate, subtype="PCM_16")
    shown = {f"original ({name})": sound, "reconstruction": decoded}
    save_image(spectrogram_sheet(shown, rate), paths[2])
    return paths
