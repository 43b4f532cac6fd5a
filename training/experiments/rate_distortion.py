"""Rate and distortion: tokenizers, of whatever library, beside JPEG, WebP and AVIF or Opus at as many bits.

python -m training.experiments.rate_distortion images tokenizers=[me/mine,they/theirs] dataset=path/to/images
python -m training.experiments.rate_distortion audio tokenizers=[runs/mine/model] config_name=null \\
    dataset=path/to/recordings

A tokenizer is a point; one with several quantizers a curve, over the first 1, 2, ... of them. A file format is
a curve over its qualities. All are measured by the same code on the same samples.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from hub_cards.evaluation import METRICS, OF_CODES
from training.data.image_sizes import LPIPS, SSIM, check_resolution
from training.data.images import build_image_dataloader
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.evaluation import audio, image
from training.evaluation.evaluated_data import evaluated_on
from training.evaluation.report import Findings, model_label
from training.experiments.rate_curves import Point, draw, rows_of
from training.experiments.report import publish
from training.experiments.runs import REPOSITORY
from training.losses.perceptual import load_lpips
from training.metrics.inception import load_inception
from training.metrics.speech import LOADERS
from training.peers import audio_files, image_files
from training.peers.face import Peer
from training.peers.opening import open_audio_tokenizer, open_image_tokenizer
from training.runtime.console import command
from training.runtime.settings import SettingsError, at_least, setting

# More quantizers than this, and only the powers of two among the prefixes are measured.
ALL_PREFIXES = 8
RATE = {"images": "bits_per_pixel", "audio": "bitrate"}


def _parts(name: str) -> tuple[str, str | None]:
    """A tokenizer's name, and the folder in a pipeline after a colon."""
    if Path(name).exists():
        return name, None
    repository, _, folder = name.partition(":")
    return repository, folder or None


def label_of(name: str) -> str:
    """Return what a tokenizer is called on the page: by its name on the Hub, or its folder's."""
    folder, _ = _parts(name)
    return model_label(folder) if Path(folder).exists() else name


@dataclass
class Compared:
    """Comparison of tokenizers."""

    tokenizers: list[str] = setting([], "folders or names on the Hub; `NAME:FOLDER` of a pipeline")
    num_quantizers: list[int] = setting(
        [], "prefixes of tokenizers with several; [] for all, of more than 8 the powers of two"
    )
    data_name: str | None = setting(None, "what to call the data; by default their id or folder")
    output: str | None = setting(
        None, "folder of results.json, README.md and figure.png; by default one in docs/results"
    )

    def __post_init__(self):
        if not self.tokenizers:
            raise SettingsError("tokenizers: name at least one, tokenizers=[FOLDER]")
        if self.num_quantizers and min(self.num_quantizers) < 1:
            raise SettingsError(f"num_quantizers must be at least 1, got {self.num_quantizers}")
        labels = [label_of(name) for name in self.tokenizers]
        for label in labels:
            if labels.count(label) > 1:
                raise SettingsError(f"tokenizers: two would be called {label}: rename a folder")


@dataclass
class ComparedImages(Compared):
    """Comparison of tokenizers."""

    formats: list[str] = setting(list(image_files.FORMATS), "file formats; [] for none")
    qualities: list[int] = setting([1, 5, 10, 20, 30, 50, 70, 90], "of the file formats, 0 to 100")
    lpips: list[str] = setting(["alex"], "networks of LPIPS, alex and vgg; [] for none")
    fid: bool = setting(False, "rFID (needs the Inception network's weights)")
    batch_size: int = setting(64, "images at a time, per process")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size")
        for name in self.formats:
            if name not in image_files.FORMATS:
                known = ", ".join(image_files.FORMATS)
                raise SettingsError(f"formats: there are {known}, got {name!r}")
        for quality in self.qualities:
            if not 0 <= quality <= 100:
                raise SettingsError(f"qualities lie between 0 and 100, got {quality}")


@dataclass
class ComparedAudio(Compared, audio.SpeechMetricSettings):
    """Comparison of tokenizers."""

    metrics: list[str] = setting(["pesq", "stoi"], f"of {', '.join(LOADERS)}")
    kilobits: list[float] = setting(
        [6.0, 8.0, 12.0, 16.0, 24.0, 32.0], "of Opus, a second, 6 to 256; [] for no Opus"
    )

    def __post_init__(self):
        Compared.__post_init__(self)
        audio.SpeechMetricSettings.__post_init__(self)
        for rate in self.kilobits:
            if not audio_files.LEAST <= rate <= audio_files.MOST:
                raise SettingsError(f"kilobits lie between 6 and 256 for Opus, got {rate}")


def prefixes(model: nn.Module, asked: list[int]) -> list[int]:
    """Return how many quantizers of a model are measured, one after another."""
    most = model.config.num_quantizers
    if asked:
        return [count for count in asked if count <= most] or [most]
    if most <= ALL_PREFIXES:
        return list(range(1, most + 1))
    return sorted({2**n for n in range(most.bit_length())} | {most})


def point_of(
    findings: Findings | None,
    rate: str,
    system: str,
    setting: str,
    is_file: bool,
    header: float = 0.0,
) -> Point | None:
    """Return what was measured as a point; None on all processes but the main one."""
    if findings is None:
        return None
    metrics = dict(findings.metrics)
    spent = metrics.pop(rate, None)
    found = Point(system, setting, is_file, spent, metrics, header, findings.samples)
    shown = "no discrete code" if found.rate is None else f"{found.rate:.4g}"
    logging.info(f"{system}, {setting}: {shown} {METRICS[rate][0]}")
    return found


def image_points(
    settings: ComparedImages, data: EvaluatedImages, split: str, accelerator: Accelerator
) -> Iterator[Point]:
    """Measure image tokenizers and file formats; the resolution is the first tokenizer's by default."""
    models = {name: open_image_tokenizer(*_parts(name)) for name in settings.tokenizers}
    first = next(iter(models))
    if data.resolution is None and isinstance(models[first], Peer):
        raise SettingsError("resolution: set it in pixels, or name a SimVQ tokenizer first")
    at_trained_resolution(data, first)
    networks = {f"LPIPS (lpips=[{net}])": LPIPS[net] for net in settings.lpips}
    check_resolution(data.resolution, networks | {"SSIM": SSIM})
    for model in models.values():
        image.check_divisible(data.resolution, model.config)
    perceptual = {net: load_lpips(net).to(accelerator.device) for net in settings.lpips}
    inception = load_inception().to(accelerator.device) if settings.fid else None

    def measure(model: nn.Module, used: int | None = None) -> Findings:
        loader = build_image_dataloader(
            data, split, batch_size=settings.batch_size, train=False, seed=0
        )
        return image.evaluate(
            model,
            accelerator.prepare(loader),
            accelerator,
            inception=inception,
            perceptual=perceptual,
            num_quantizers=used,
        )

    for name, model in models.items():
        yield from _curve(name, model.to(accelerator.device), settings, "bits_per_pixel", measure)
    for name in settings.formats:
        if not image_files.available(name):
            logging.warning(f"{name} is left out: this Pillow was built without it")
            continue
        for quality in settings.qualities:
            file = image_files.ImageFile(name, quality)
            header = file.header_bits(data.resolution) / data.resolution**2
            yield point_of(
                measure(file), "bits_per_pixel", name, f"quality {quality}", True, header
            )


def audio_points(
    settings: ComparedAudio, data: audio.EvaluatedAudio, split: str, accelerator: Accelerator
) -> Iterator[Point]:
    """Measure audio tokenizers, each at its own sampling rate, and Opus at that of the first."""
    models = {name: open_audio_tokenizer(name) for name in settings.tokenizers}
    metrics, missing = audio.load_metrics(settings, accelerator.device)
    for line in missing.values():
        logging.warning(line)

    def measure(model: nn.Module, used: int | None = None) -> Findings:
        rate = model.config.sampling_rate
        recordings = audio.whole_recordings(data, split, rate, accelerator)
        return audio.evaluate(model, recordings, accelerator, metrics, used)

    for name, model in models.items():
        yield from _curve(name, model.to(accelerator.device), settings, "bitrate", measure)
    if settings.kilobits and not audio_files.available():
        logging.warning("Opus is left out: this libsndfile was built without it")
        return
    for kilobits in settings.kilobits:
        rate = next(iter(models.values())).config.sampling_rate
        found = measure(audio_files.OpusFile(kilobits, rate))
        yield point_of(found, "bitrate", "Opus", f"{kilobits:g} kbit/s", True)


def _curve(
    name: str, model: nn.Module, settings: Compared, rate: str, measure: Callable[..., Findings]
) -> Iterator[Point]:
    """Measure a tokenizer with each of its prefixes."""
    for used in prefixes(model, settings.num_quantizers):
        most = model.config.num_quantizers
        words = "" if most == 1 else f"the first {used} of {most} quantizers"
        yield point_of(measure(model, used), rate, label_of(name), words, False)


TEXT = {
    "images": (
        "Every tokenizer, and below it each file format at as many bits. Codes count log2 K bits, without "
        "entropy coding. Files are whole, as Pillow writes them; the dotted lines leave out what a file of a "
        "grey square takes too, which for small images is most of it."
    ),
    "audio": (
        "Every tokenizer, and below it Opus at as many bits, as libsndfile writes it: its packets alone, "
        "without Ogg's pages. Codes count log2 K bits, without entropy coding."
    ),
}


def compare(kind: str, settings: Compared, data, accelerator: Accelerator) -> None:
    """Measure all, and write the page.

    Args:
        kind: "images" or "audio".
    """
    on = evaluated_on(data, settings.data_name)
    if on.split is None:
        raise SettingsError("validation_split: name the split to measure on")
    measured = image_points if kind == "images" else audio_points
    with torch.no_grad():
        points = list(measured(settings, data, on.split, accelerator))
    if not accelerator.is_main_process:
        return
    if kind == "images":
        shown = ["psnr", "ssim", *(f"lpips_{net}" for net in settings.lpips)]
        shown += ["rfid"] * settings.fid
        noun, size = "images", f" at {data.resolution} x {data.resolution} pixels"
    else:
        not_quality = {*OF_CODES, "reachable_utilisation"}
        shown = [key for key in METRICS if key in points[0].metrics and key not in not_quality]
        noun, size = "recordings", ""
    rate = RATE[kind]
    publish(
        Path(settings.output or REPOSITORY / "docs/results" / f"rate_distortion_{kind}"),
        {"data": on.name, "rate": rate, "points": [asdict(point) for point in points]},
        "Rate and distortion",
        TEXT[kind],
        rows_of(points, rate, shown),
        draw(points, rate, shown),
        f"Scale: {points[0].samples:,} {noun} of {on.name}{size}.",
    )


def main() -> None:
    """Command line."""
    kinds = {
        "images": {"settings": ComparedImages, "data": EvaluatedImages},
        "audio": {"settings": ComparedAudio, "data": audio.EvaluatedAudio},
    }
    words = sys.argv[1:]
    helped = not {"-h", "--help"}.isdisjoint(words)
    kind = next((word for word in words if word in kinds), "images" if helped else None)

    def choose(words: list[str]):
        if kind is None:
            raise SettingsError(f"name first what is compared: {' or '.join(kinds)}")
        return kinds[kind], [word for word in words if word != kind]

    def body(settings: Compared, data, accelerator: Accelerator) -> None:
        compare(kind, settings, data, accelerator)

    command(choose, body, __doc__)


if __name__ == "__main__":
    main()
