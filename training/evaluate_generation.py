"""Evaluate generated pictures: gFID, Inception Score, nearest training pictures, samples of each class.

accelerate launch training/evaluate_generation.py pipeline=me/my-generator output=results dataset=path/to/photos
accelerate launch training/evaluate_generation.py pictures=path/to/made output=results dataset=path/to/photos

`dataset` are the real pictures: those that the generator was trained on (train_split), and others that it never
saw (validation_split), the yardstick of the nearest neighbours. evaluation.json, evaluation.md, samples.png and
neighbours.png go to `output`, for a local pipeline beside it.
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hub_cards.evaluation import Evaluation
from hub_cards.tokenizer_card import is_hub_id
from training.data.images import ImageDataConfig, build_image_dataloader
from training.data.loader import sample_counts
from training.evaluation.evaluated_data import (
    EvaluatedImages,
    evaluated_on,
    join_sentences,
    resolution_note,
    set_resolution,
    trained_resolution,
)
from training.evaluation.generated_pictures import Generated, first_side, from_files, from_pipeline
from training.evaluation.report import (
    Findings,
    Fingerprint,
    report_folder,
    sample_hashes,
    versions,
    write_report,
)
from training.evaluation.sheets import ClassGrid, write_neighbours
from training.loop.validation import measured_batches
from training.metrics.images import to_bytes
from training.metrics.inception import (
    frechet_distance,
    inception_score,
    load_inception,
    load_inception_classifier,
)
from training.metrics.neighbours import NearestPictures, neighbour_metrics, pixel_vectors
from training.runtime.console import command
from training.runtime.errors import MissingWeights
from training.runtime.float64 import to_float64
from training.runtime.settings import SettingsError, at_least, one_of, setting

# Rows of neighbours.png.
SHOWN = 12


@dataclass
class GenerationEvaluationSettings:
    """The evaluation."""

    pipeline: str | None = setting(
        None, "generator to sample from: folder, or name on the Hub, of a SimVQImagePipeline"
    )
    pictures: str | None = setting(
        None, "or pictures made already: folder (of folders, one a class) or parquet"
    )
    pictures_split: str = setting("train", "split of those")
    samples: int = setting(50_000, "pictures to sample, or to take of those made already")
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1 is none")
    temperature: float = setting(1.0, "temperature of sampling")
    top_k: int = setting(0, "sample among so many codes; 0 among all")
    top_p: float = setting(1.0, "sample among the likeliest codes of this probability")
    seed: int = setting(0, "seed of sampling")
    data_name: str | None = setting(
        None, "what to call the real pictures; by default their Hub id, or their folder's name"
    )
    reference: str = setting("train", "split that gFID compares with: train or validation")
    neighbours: int = setting(500, "samples whose nearest training pictures are sought; 0 for none")
    inception_score: bool = setting(True, "Inception Score, if its classifier can be downloaded")
    batch_size: int = setting(64, "pictures at a time, per process")
    output: str | None = setting(None, "folder of the results; a local pipeline's own by default")

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 2, "samples")
        at_least(self, 0, "neighbours", "seed")
        one_of(self, "reference", ("train", "validation"))
        if (self.pipeline is None) == (self.pictures is None):
            raise SettingsError("pipeline, pictures: name a generator, or pictures made by one")
        if self.pictures is not None and self.output is None:
            raise SettingsError("output: name a folder for the results")


@dataclass
class RealPictures:
    """What generated pictures are held against; loaders are prepared.

    Attributes:
        train: of the generator's training pictures; None if neither gFID nor neighbours ask for them.
        held_out: of pictures that it never saw, or None.
        reference: which of the two gFID compares with, "train" or "validation".
    """

    train: DataLoader | None
    held_out: DataLoader | None
    reference: str


@dataclass
class _Taken:
    """What is kept of a set of pictures."""

    count: int = 0
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    features: list[Tensor] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def keep(self, figures: dict[str, Tensor], neighbours: int) -> None:
        """Count a batch, and keep the first `neighbours` pictures' vectors, the first SHOWN pictures."""
        self.fingerprint.add(figures["hash"])
        left = max(0, neighbours - self.count)
        if left:
            self.features.append(figures["features"][:left])
            self.pixels.append(pixel_vectors(figures["pictures"][:left]))
            shown = max(0, SHOWN - self.count)
            self.pictures.append(figures["pictures"][:left][:shown].clone())
        self.count += len(figures["hash"])

    def nearest(self) -> dict[str, NearestPictures]:
        """A search for each space."""
        features, pixels = torch.cat(self.features), torch.cat(self.pixels)
        return {
            "feature": NearestPictures(features, kept=SHOWN),
            # Root mean square difference, in grey levels.
            "pixel": NearestPictures(pixels, pixels.shape[1] ** -0.5, kept=SHOWN),
        }


def evaluate(
    generated: Generated,
    real: RealPictures,
    accelerator: Accelerator,
    inception: nn.Module,
    *,
    classifier: nn.Module | None = None,
    neighbours: int = 0,
    folder: Path | None = None,
) -> Findings | None:
    """Figures of generated pictures of all ranks, each counted once.

    Args:
        generated: its loader prepared.
        inception: 8-bit pictures to features, for gFID and neighbours.
        classifier: 8-bit pictures to logits, for the Inception Score.
        neighbours: how many pictures' nearest training pictures are sought.
        folder: for samples.png and neighbours.png.

    Returns:
        On the main process findings, whose fingerprint is of the reference pictures; None on the others.

    Raises:
        ValueError: if there are fewer than two readable pictures of a kind that is needed.
    """
    main = accelerator.is_main_process
    fid = frechet_distance(accelerator.device)

    def passed(loader: DataLoader, pixels, desc: str):
        def measure(batch: dict[str, Tensor]):
            values, labels = pixels(batch)
            pictures = to_bytes(values)
            figures = {"pictures": pictures, "features": inception(pictures), "label": labels}
            figures["hash"] = sample_hashes(pictures).to(pictures.device)
            if classifier is not None and loader is generated.loader:
                figures["logits"] = classifier(pictures)
            return figures, labels  # there are no codes

        for figures, *_ in measured_batches(loader, accelerator, measure, desc):
            if main:
                yield figures

    grid, taken = ClassGrid(generated.names), _Taken()
    for figures in passed(generated.loader, generated.pixels, "generated pictures"):
        fid.update(to_float64(figures["features"]), real=False)
        grid.add(figures["pictures"], figures["label"])
        if classifier is not None:
            taken.logits.append(figures["logits"].cpu())
        taken.keep(figures, neighbours)

    def plain(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["pixel_values"], batch["unreadable"]

    held_out, train = _Taken(), _Taken()
    if real.held_out is not None:
        for figures in passed(real.held_out, plain, "held-out pictures"):
            held_out.keep(figures, neighbours)
            if real.reference == "validation":
                fid.update(to_float64(figures["features"]), real=True)
    groups = {"sample": taken, "held-out picture": held_out}
    groups = {title: group.nearest() for title, group in groups.items() if group.features}
    if real.train is not None:
        for figures in passed(real.train, plain, "training pictures"):
            train.keep(figures, 0)
            for searches in groups.values():
                searches["feature"].add(figures["features"], figures["pictures"])
                searches["pixel"].add(pixel_vectors(figures["pictures"]), figures["pictures"])
            if real.reference == "train":
                fid.update(to_float64(figures["features"]), real=True)
    reference = train if real.reference == "train" else held_out
    # Every rank has to fail where the main process does.
    counts = torch.tensor([taken.count, reference.count, train.count], device=accelerator.device)
    made, against, trained = accelerator.gather(counts)[:3].tolist()
    for number, kind in ((made, "generated pictures"), (against, f"{real.reference} pictures")):
        if number < 2:
            raise ValueError(f"gFID needs at least two {kind}, {number} can be read")
    if neighbours and not trained:
        raise ValueError("no training picture can be read: neighbours=0 does without")
    if not main:
        return None
    metrics = {"gfid": float(fid.compute())}
    if classifier is not None:
        metrics["inception_score"] = inception_score(torch.cat(taken.logits))
    if neighbours:
        metrics |= neighbour_metrics(groups["sample"], groups.get("held-out picture"))
    if folder is not None:
        grid.write(folder / "samples.png")
        if neighbours:
            pictures = {"sample": taken.pictures, "held-out picture": held_out.pictures}
            rows = {title: {"pictures": torch.cat(pictures[title])} for title in groups}
            for title, searches in groups.items():
                rows[title] |= {n: (s.pictures, s.distances) for n, s in searches.items()}
            write_neighbours(folder / "neighbours.png", rows)
    return Findings(
        metrics, {}, taken.count, str(reference.fingerprint), reference_samples=reference.count
    )


def main() -> None:
    """Command line."""
    command({"settings": GenerationEvaluationSettings, "data": EvaluatedImages}, run, __doc__)


def run(
    settings: GenerationEvaluationSettings, data: ImageDataConfig, accelerator: Accelerator
) -> None:
    """Evaluate and write the results."""
    if settings.pipeline is None:
        folder = Path(settings.output)
    else:
        try:
            folder = report_folder(settings.pipeline, settings.output)
        except SettingsError as error:
            raise SettingsError(str(error).replace("model: ", "pipeline: ")) from error
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
        write_report(folder, report, "picture")
        print(f"Pictures: {folder / 'samples.png'}", end="")
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
    """Loaders of the real pictures that are asked for, the held-out ones only as many as needed."""
    of_validation = settings.reference == "validation"
    if of_validation and data.validation_split is None:
        raise SettingsError("reference: validation needs validation_split")
    if settings.neighbours and data.validation_split == data.train_split:
        raise SettingsError("validation_split: name pictures that the generator never saw, or null")

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
        f"Real pictures: short side to {data.resolution} pixels (bilinear, antialiased), centre crop; "
        "generated ones likewise where they are larger or smaller; all rounded to 8 bits. gFID: "
        f"torch-fidelity's Inception (2015-12-05, 2048 features), generated pictures against {split} of the "
        "data set. Inception Score: mean over ten parts. Nearest training pictures: Euclidean distance of "
        "those features, and root mean square difference in grey levels (0 to 255) of pictures averaged to at "
        f"most 32 x 32; medians over {min(settings.neighbours, findings.samples):,} samples, and over held-out "
        "real pictures as the yardstick. Of new pictures about 0.05 lie nearer than 95 % of held-out ones do.",
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


if __name__ == "__main__":
    main()
