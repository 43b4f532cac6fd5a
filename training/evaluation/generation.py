"""Evaluation of generated images, sampled from a pipeline or made before."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from hub_cards.evaluation import Evaluation
from hub_cards.tokenizer_card import is_hub_id
from training.data.image_sizes import trained_resolution
from training.data.images import ImageDataConfig, build_image_dataloader
from training.data.loader import sample_counts
from training.data.model_images import resolution_note, set_resolution
from training.evaluation.evaluated_data import evaluated_on, join_sentences
from training.evaluation.generated_pictures import Generated, first_side, from_files, from_pipeline
from training.evaluation.generation_figures import RealPictures, evaluate
from training.evaluation.report import (
    Findings,
    report_folder,
    versions,
    write_report,
)
from training.metrics.inception import (
    load_inception,
    load_inception_classifier,
)
from training.runtime.errors import MissingWeights
from training.runtime.settings import SettingsError, at_least, one_of, setting


@dataclass
class GenerationEvaluationSettings:
    """The evaluation."""

    pipeline: str | None = setting(
        None, "generator to sample from: folder, or name on the Hub, of a SimVQImagePipeline"
    )
    pictures: str | None = setting(
        None, "or images made already: folder (of folders, one a class) or parquet"
    )
    pictures_split: str = setting("train", "split of those")
    samples: int = setting(50_000, "images to sample, or to take of those made already")
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1 is none")
    temperature: float = setting(1.0, "temperature of sampling")
    top_k: int = setting(0, "sample among so many codes; 0 among all")
    top_p: float = setting(1.0, "sample among the likeliest codes of this probability")
    seed: int = setting(0, "seed of sampling")
    data_name: str | None = setting(
        None, "what to call the real images; by default their Hub id, or their folder's name"
    )
    reference: str = setting("train", "split that gFID compares with: train or validation")
    neighbours: int = setting(500, "samples whose nearest training images are sought; 0 for none")
    inception_score: bool = setting(True, "Inception Score, if its classifier can be downloaded")
    batch_size: int = setting(64, "images at a time, per process")
    output: str | None = setting(None, "folder of the results; a local pipeline's own by default")

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 2, "samples")
        at_least(self, 0, "neighbours", "seed")
        one_of(self, "reference", ("train", "validation"))
        if (self.pipeline is None) == (self.pictures is None):
            raise SettingsError("pipeline, pictures: name a generator, or images made by one")
        if self.pictures is not None and self.output is None:
            raise SettingsError("output: name a folder for the results")


def run(
    settings: GenerationEvaluationSettings, data: ImageDataConfig, accelerator: Accelerator
) -> None:
    """Evaluate and write the results."""
    if settings.pipeline is None:
        folder = Path(settings.output)
    else:
        folder = report_folder(settings.pipeline, settings.output, "pipeline")
    pipe = _pipeline(settings, accelerator)
    if pipe is not None:
        own = trained_resolution(pipe.processor)
    else:
        own = first_side(data, settings.pictures, settings.pictures_split)
    set_resolution(data, own, settings.pipeline or settings.pictures)
    real = _real_pictures(settings, data, accelerator)
    if accelerator.is_main_process:
        loaders = {"training {}": real.train, "held-out {}": real.held_out}
        logging.info(sample_counts(data, loaders))
    generated = _generated(settings, data, accelerator, pipe)
    classifier, notes = _classifier(accelerator) if settings.inception_score else (None, [])
    if accelerator.is_main_process:
        logging.info(f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
    generated.loader = accelerator.prepare(generated.loader)
    findings = evaluate(
        generated,
        real,
        accelerator,
        load_inception().to(accelerator.device),
        classifier=classifier,
        neighbours=settings.neighbours,
        folder=folder,
    )
    if findings is not None:
        extra = {"device": accelerator.device.type, "notes": notes}
        report = _report(settings, data, findings, own, **extra)
        write_report(folder, report, "image")
        print(f"Images: {folder / 'samples.png'}", end="")
        print(f", {folder / 'neighbours.png'}" if settings.neighbours else "")


def _classifier(accelerator: Accelerator) -> tuple[nn.Module | None, list[str]]:
    """Inception's classifier, if every rank has it, and otherwise a note that it is not there."""
    classifier, reason = None, "another process cannot have it"
    try:
        classifier = load_inception_classifier().to(accelerator.device)
    except MissingWeights as error:
        reason = str(error)
    missing = torch.tensor([int(classifier is None)], device=accelerator.device)
    if not int(accelerator.gather(missing).sum()):
        return classifier, []
    note = f"No Inception Score: {reason}."
    if accelerator.is_main_process:
        logging.info(note)
    return None, [note]


def _pipeline(settings: GenerationEvaluationSettings, accelerator: Accelerator):
    if settings.pipeline is None:
        return None
    from modeling_simvq import SimVQImagePipeline  # needs diffusers

    pipe = SimVQImagePipeline.from_pretrained(settings.pipeline).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generated(
    settings: GenerationEvaluationSettings,
    data: ImageDataConfig,
    accelerator: Accelerator,
    pipe=None,
) -> Generated:
    if pipe is None:
        return from_files(
            data, settings.pictures, settings.pictures_split, settings.samples, settings.batch_size
        )
    return from_pipeline(
        pipe,
        settings.samples,
        resolution=data.resolution,
        batch_size=settings.batch_size,
        ranks=accelerator.num_processes,
        seed=settings.seed,
        **_sampling(settings),
    )


def _sampling(settings: GenerationEvaluationSettings) -> dict:
    return {
        name: getattr(settings, name)
        for name in ("guidance_scale", "temperature", "top_k", "top_p")
    }


def _real_pictures(
    settings: GenerationEvaluationSettings, data: ImageDataConfig, accelerator: Accelerator
) -> RealPictures:
    """Loaders of the real images that are asked for, the held-out ones only as many as needed."""
    of_validation = settings.reference == "validation"
    if of_validation and data.validation_split is None:
        raise SettingsError("reference: validation needs validation_split")
    if settings.neighbours and data.validation_split == data.train_split:
        raise SettingsError("validation_split: name images that the generator never saw, or null")

    def loader(split: str, limit: int | None) -> DataLoader:
        limited = dataclasses.replace(data, max_validation_samples=limit)
        made = build_image_dataloader(
            limited, split, batch_size=settings.batch_size, train=False, seed=0
        )
        return accelerator.prepare(made)

    train = held_out = None
    if settings.neighbours or not of_validation:
        train = loader(data.train_split, data.max_train_samples)
    if of_validation:
        held_out = loader(data.validation_split, data.max_validation_samples)
    elif settings.neighbours and data.validation_split is not None:
        most = data.max_validation_samples or settings.neighbours
        held_out = loader(data.validation_split, min(most, settings.neighbours))
    return RealPictures(train, held_out, settings.reference)


def _report(
    settings: GenerationEvaluationSettings,
    data: ImageDataConfig,
    findings: Findings,
    own: int | None,
    **extra,
) -> Evaluation:
    on_hub = is_hub_id(data.dataset)
    split = data.train_split if settings.reference == "train" else data.validation_split
    on = evaluated_on(data, settings.data_name, split)
    protocol = join_sentences(
        resolution_note(data.resolution, own),
        f"Real images: short side to {data.resolution} pixels (bilinear, antialiased), centre crop; "
        "generated ones likewise where they are larger or smaller; all rounded to 8 bits. gFID: "
        f"torch-fidelity's Inception (2015-12-05, 2048 features), generated images against {split} of the "
        "dataset. Inception Score: mean over ten parts. Nearest training images: Euclidean distance of "
        "those features, and root mean square difference in grey levels (0 to 255) of images averaged to at "
        f"most 32 x 32; medians over {min(settings.neighbours, findings.samples):,} samples, and over held-out "
        "real images as the yardstick. Of new images about 0.05 lie nearer than 95 % of held-out ones do.",
    )
    made = {"pictures": "made before, from files"}
    if settings.pipeline is not None:
        made = _sampling(settings) | {"seed": settings.seed, "classes": "each in turn"}
    return Evaluation(
        dataset=on.name,
        metrics=findings.metrics,
        dataset_id=data.dataset if on_hub else None,
        config=data.config_name if on_hub else None,
        split=on.named_split,
        samples=findings.samples,
        protocol=protocol,
        extra={
            "fingerprint": findings.fingerprint,
            "reference_samples": findings.reference_samples,
            "evaluated_at": data.resolution,
            "trained_at": own,
            "notes": extra.pop("notes"),
            "settings": made
            | {
                "resolution": data.resolution,
                "batch_size": settings.batch_size,
                "reference": settings.reference,
                "neighbours": settings.neighbours,
                **extra,
            },
            "versions": versions("torchmetrics", "torch-fidelity"),
        },
    )
