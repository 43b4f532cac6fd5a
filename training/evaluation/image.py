"""Evaluation of an image tokenizer by the paper's protocol: rFID, LPIPS, PSNR, SSIM, utilisation."""

import logging
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hub_cards.evaluation import Evaluation
from hub_cards.tokenizer_card import is_hub_id
from training.codebook.usage import CodeCounter
from training.data.image_sizes import LPIPS, SSIM, check_resolution
from training.data.images import ImageDataConfig, build_image_dataloader, to_values
from training.data.loader import sample_counts
from training.data.model_images import at_trained_resolution, resolution_note, set_resolution
from training.evaluation.evaluated_data import evaluated_on, join_sentences, measured_on
from training.evaluation.report import (
    Findings,
    Fingerprint,
    Mean,
    intervals,
    prefix_note,
    report_folder,
    sample_hashes,
    versions,
    write_report,
)
from training.loop.validation import measured_batches
from training.losses.perceptual import load_lpips
from training.metrics.images import image_figures, to_bytes
from training.metrics.inception import frechet_distance, load_inception
from training.peers.face import Peer, PeerConfig, bits_of
from training.peers.opening import open_image_tokenizer
from training.runtime.float64 import to_float64
from training.runtime.settings import SettingsError, at_least, setting


@dataclass
class ImageEvaluationSettings:
    """The evaluation."""

    model: str = setting(
        "", "folder, or name on the Hub; also another library's, see docs/evaluation.md"
    )
    subfolder: str | None = setting(None, "of a pipeline of diffusers, the tokenizer's: vae, vqvae")
    pixel_range: list[float] = setting(
        [-1.0, 1.0], "pixel values that another library's tokenizer was trained on; aMUSEd's: [0,1]"
    )
    batch_size: int = setting(64, "images at a time, per process")
    fid: bool = setting(True, "rFID (needs the Inception network's weights)")
    lpips: list[str] = setting(["alex", "vgg"], "networks of LPIPS; [] for none")
    num_quantizers: int | None = setting(
        None, "of a model with several, how many, the first ones; give another output then"
    )
    data_name: str | None = setting(
        None, "what to call the evaluated data; by default their Hub id, or their folder's name"
    )
    output: str | None = setting(
        None, "folder of evaluation.json and evaluation.md; a local model's own by default"
    )

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        if not self.model:
            raise SettingsError("model: name a folder or a Hub repository, model=...")
        if len(self.pixel_range) != 2 or self.pixel_range[0] >= self.pixel_range[1]:
            raise SettingsError(
                f"pixel_range: give the lowest and the highest value, got {self.pixel_range}"
            )
        for net in self.lpips:
            if net not in ("alex", "vgg"):
                raise SettingsError(f"lpips: networks are alex and vgg, got {net!r}")


class BatchPsnr:
    """PSNR as the authors' script prints it: of whole batches in order, a short last one counting in full.

    By Jensen's inequality it lies below the mean over images (fixture eval_image).
    """

    def __init__(self, batch_size: int = 64):
        self.batch_size, self.pending, self.sum, self.batches = batch_size, [], 0.0, 0

    def add(self, psnr: Tensor) -> None:
        """Add the PSNR of images (B,), in the order of the dataset."""
        self.pending += (10 ** (-to_float64(psnr) / 10)).tolist()
        while len(self.pending) >= self.batch_size:
            self._close(self.pending[: self.batch_size])
            del self.pending[: self.batch_size]

    def _close(self, errors: list[float]) -> None:
        self.sum -= 10 * math.log10(sum(errors) / len(errors))
        self.batches += 1

    def read(self) -> float:
        """Return the mean over batches."""
        if self.pending:
            self._close(self.pending)
            self.pending = []
        return self.sum / self.batches


def evaluate(
    model: nn.Module,
    loader,
    accelerator: Accelerator,
    *,
    inception: nn.Module | None = None,
    perceptual: dict[str, nn.Module] | None = None,
    num_quantizers: int | None = None,
) -> Findings | None:
    """Measure all images of all ranks, each counted once.

    Args:
        model: with the face of SimVQImageModel (training/peers/face.py), in evaluation mode, on the
            accelerator's device.
        loader: prepared; batches of build_image_dataloader.
        inception: 8-bit images to features, for rFID.
        perceptual: name to LPIPS network.
        num_quantizers: of several, how many, the first ones; all by default.

    Returns:
        The findings on the main process, None on the others.

    Raises:
        ValueError: if no image can be read, or rFID is asked of fewer than two.
    """
    used, size = num_quantizers or model.config.num_quantizers, model.config.codebook_size
    counter = CodeCounter(size or 1, accelerator.device, used if size else 1)
    means: dict[str, Mean] = {}
    bits, samples = Mean(), 0
    batch_psnr, fingerprint, left_out = BatchPsnr(), Fingerprint(), 0
    fid = frechet_distance(accelerator.device) if inception is not None else None

    def measure(batch: dict[str, Tensor]):
        pixels = to_values(batch["pixel_values"])
        output = model(pixels, num_quantizers=num_quantizers)
        decoded = output.pixel_values.clamp(-1, 1)
        figures = image_figures(pixels, decoded)
        figures["hash"] = sample_hashes(to_bytes(pixels)).to(pixels.device)
        for net, network in (perceptual or {}).items():
            figures[f"lpips_{net}"] = network(decoded, pixels).flatten()
        if inception is not None:
            figures["real"], figures["decoded"] = (
                inception(to_bytes(x)) for x in (pixels, decoded)
            )
        codes = output.image_codes
        spent = bits_of(output, codes, size)
        if spent is not None:
            figures["bits_per_pixel"] = spent / pixels[0, 0].numel()
        if codes is None:
            codes = torch.zeros(len(pixels), 0, dtype=torch.int64, device=pixels.device)
        return figures, codes

    for figures, codes, unreadable in measured_batches(loader, accelerator, measure, "evaluating"):
        left_out, samples = left_out + unreadable, samples + len(codes)
        if not accelerator.is_main_process:
            continue
        counter.update(codes)
        if fid is not None:
            fid.update(to_float64(figures.pop("real")), real=True)
            fid.update(to_float64(figures.pop("decoded")), real=False)
        fingerprint.add(figures.pop("hash"))
        batch_psnr.add(figures["psnr"])
        if "bits_per_pixel" in figures:
            bits.add(figures.pop("bits_per_pixel"))
        for name, values in figures.items():
            means.setdefault(name, Mean()).add(values)
    usage = counter.read(accelerator)
    if samples == 0:
        raise ValueError("no image of the dataset can be read")
    if not accelerator.is_main_process:
        return None
    count = means["psnr"].count
    metrics = {name: mean.mean for name, mean in means.items()}
    metrics["psnr_batch"] = batch_psnr.read()
    if size:
        metrics |= usage.metrics()
    if bits.count:
        metrics["bits_per_pixel"] = bits.mean
    if fid is not None:
        if count < 2:
            raise ValueError("rFID needs at least two images: fid=false does without")
        metrics["rfid"] = float(fid.compute())
    return Findings(metrics, intervals(means), count, str(fingerprint), unreadable=left_out)


def check_divisible(resolution: int, config: PeerConfig) -> None:
    """Refuse images that a tokenizer cannot cut into its patches.

    Raises:
        SettingsError: naming the nearest smaller size that it takes.
    """
    factor = config.downsample_factor
    if resolution % factor:
        fitting = resolution // factor * factor or factor
        raise SettingsError(
            f"resolution: {config.name} takes multiples of {factor} pixels, got {resolution}: set {fitting}"
        )


def run(settings: ImageEvaluationSettings, data: ImageDataConfig, accelerator: Accelerator) -> None:
    """Evaluate and write the results."""
    on = evaluated_on(data, settings.data_name)
    data.validation_split = on.split
    if data.validation_split is None:
        raise SettingsError("validation_split: name the split to evaluate on")
    folder = report_folder(settings.model, settings.output)
    networks = {f"LPIPS (lpips=[{net}])": LPIPS[net] for net in settings.lpips} | {"SSIM": SSIM}
    if data.resolution is not None:  # before a model is loaded, which may take long
        check_resolution(data.resolution, networks)
    model = open_image_tokenizer(settings.model, settings.subfolder, tuple(settings.pixel_range))
    if isinstance(model, Peer):
        trained = set_resolution(data, model.config.resolution, settings.model)
        check_divisible(data.resolution, model.config)
    else:
        trained = at_trained_resolution(data, settings.model)
    check_resolution(data.resolution, networks)
    model = model.to(accelerator.device)
    if accelerator.is_main_process:
        logging.info(f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
    loader = build_image_dataloader(
        data, data.validation_split, batch_size=settings.batch_size, train=False, seed=0
    )
    if accelerator.is_main_process:
        logging.info(sample_counts(data, {f"{{}} of split {data.validation_split}": loader}))
    perceptual = {net: load_lpips(net).to(accelerator.device) for net in settings.lpips}
    inception = load_inception().to(accelerator.device) if settings.fid else None
    findings = evaluate(
        model,
        accelerator.prepare(loader),
        accelerator,
        inception=inception,
        perceptual=perceptual,
        num_quantizers=settings.num_quantizers,
    )
    if findings is not None:
        on_hub = is_hub_id(data.dataset)
        protocol = join_sentences(
            measured_on(on, data, findings.samples, "image", settings.model),
            getattr(model.config, "note", ""),
            prefix_note(model.config, settings.num_quantizers),
            f"Short side to {data.resolution} pixels (bilinear, antialiased), centre crop.",
            resolution_note(data.resolution, trained),
            "PSNR, SSIM "
            "(7 x 7 uniform window) and rFID on images rounded to 8 bits. PSNR, SSIM and LPIPS are "
            "means over images, PSNR also over batches of 64, as the paper's script has it. rFID: "
            "torch-fidelity's Inception (2015-12-05, 2048 features) against the same images. Bits per pixel: "
            "codes of an image times log2 K.",
        )
        evaluation = Evaluation(
            dataset=on.name,
            metrics=findings.metrics,
            dataset_id=data.dataset if on_hub else None,
            config=data.config_name if on_hub else None,
            split=on.named_split,
            samples=findings.samples,
            protocol=protocol,
            extra={
                "intervals": findings.intervals,
                "unreadable": findings.unreadable,
                "fingerprint": findings.fingerprint,
                "evaluated_at": data.resolution,
                "trained_at": trained,
                "settings": {
                    "resolution": data.resolution,
                    "batch_size": settings.batch_size,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "device": accelerator.device.type,
                    "seed": "none, nothing is drawn",
                },
                "versions": versions("torchmetrics", "torch-fidelity", "lpips", "torch"),
            },
        )
        write_report(folder, evaluation, "image")
