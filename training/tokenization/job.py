"""Tokenization of a dataset as its settings say: model, sources, and the writer of the files of codes."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import AutoConfig, AutoModel

import modeling_simvq  # noqa: F401  (registers the models)
from modeling_simvq.several_quantizers import check_count
from training.data.images import ImageDataConfig
from training.data.model_images import EvaluatedImages, at_trained_resolution
from training.data.recordings import AudioDataConfig
from training.data.source import DataSettings, Source, open_splits
from training.runtime.settings import SettingsError, at_least, parse_overrides, setting
from training.tokenization.code_files import RowDigests, code_path, relative_texts
from training.tokenization.earlier_files import check_columns, has_grown, name_classes
from training.tokenization.encoders import AudioTokens, ImageTokens, Variant, weights_hash
from training.tokenization.file_writer import FileWriter
from training.tokenization.manifest import make_plan

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class TokenizeSettings:
    """The codes."""

    model: str = setting("", "tokenizer: folder, or name on the Hub")
    output: str = setting("", "folder of the codes; the same again continues there")
    splits: list[str] = setting(["train", "validation"], "splits to take")
    batch_size: int = setting(32, "samples at a time, per process")
    rows_per_file: int = setting(8192, "rows of the source in a file; what a kill can cost")
    flips: bool = setting(False, "images: each once more, mirrored")
    crops: int = setting(0, "images: so many random crops of each in place of the centre")
    seed: int = setting(0, "draws the crops")
    dtype: str = setting(
        "float32", "of convolutions; bfloat16 is faster on GPUs and gives some latents another code"
    )
    num_quantizers: int | None = setting(
        None, "how many of a tokenizer's quantizers, the first ones; all by default"
    )
    compile: bool = setting(False, "compile the encoder first: takes a minute, pays on GPUs")
    push_to_hub: str | None = setting(None, "name of a dataset on the Hub to publish it as")

    def __post_init__(self):
        at_least(self, 1, "batch_size", "rows_per_file")
        at_least(self, 0, "crops")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("model", "output"):
            if not getattr(self, name):
                raise SettingsError(f"{name}: must be given, {name}=...")
        if not self.splits:
            raise SettingsError("splits: name at least one")
        for split in self.splits:
            if not re.fullmatch(
                r"\w+(\.\w+)*", split
            ):  # they name the files, and the splits of the result
                raise SettingsError(f"splits: name whole splits, such as train, got {split!r}")

    @property
    def variants(self) -> list[Variant]:
        """Return the variants made of each image."""
        crops = range(self.crops) if self.crops else [None]
        return [
            Variant(crop, flip)
            for crop in crops
            for flip in ([False, True] if self.flips else [False])
        ]


def choose_groups(words: list[str]) -> tuple[dict[str, type], list[str]]:
    """Choose the data settings by the modality of the model that the command line names."""
    model = parse_overrides([w for w in words if w not in ("-h", "--help")]).get("model")
    audio = model and AutoConfig.from_pretrained(str(model)).model_type == "simvq_audio"
    return {
        "settings": TokenizeSettings,
        "data": AudioDataConfig if audio else EvaluatedImages,
    }, words


class Job:
    """Model, opened splits and writer; each process that takes part in a tokenization makes its own.

    Attributes:
        sources: split to its rows, samples still encoded.
        plan: make_plan, for check_manifest.

    Raises:
        SettingsError: if the splits cannot be opened, or settings do not go with the model.
    """

    def __init__(self, settings: TokenizeSettings, data: DataSettings, device: torch.device):
        self.settings, self.data, self.folder = settings, data, Path(settings.output)
        self.model = AutoModel.from_pretrained(settings.model).eval().to(device)
        try:
            count = check_count(settings.num_quantizers, self.model.config.num_quantizers)
        except ValueError as error:
            raise SettingsError(f"num_quantizers: {error}") from None
        settings = self.settings = dataclasses.replace(settings, num_quantizers=count)
        if isinstance(data, ImageDataConfig):
            at_trained_resolution(data, settings.model)
        self.tokens = (AudioTokens if isinstance(data, AudioDataConfig) else ImageTokens)(
            self.model,
            data,
            settings.seed,
            count,
            dtype=settings.dtype,
            compile=settings.compile,
        )
        if isinstance(self.tokens, AudioTokens) and (settings.flips or settings.crops):
            raise SettingsError(
                "flips and crops are for images: recordings are taken whole, as they are"
            )
        # All of them, before hours go into the first.
        opened = open_splits(data, settings.splits, "splits")
        self.sources = {
            split: limited(source, data)
            for split, source in zip(settings.splits, opened, strict=True)
        }
        self.plan = make_plan(settings, data, weights_hash(self.model))
        self.digests = RowDigests(self.tokens.source_column, data.dataset)
        self.writer = FileWriter(
            self.tokens, settings.variants, settings.batch_size, self.digests, data.num_workers
        )

    def check_columns(self) -> None:
        """Raise SettingsError where files that are there have other columns than they would get now."""
        for split, source in self.sources.items():
            columns = other_columns(source, self.tokens.source_column)
            check_columns(self.folder, split, self.writer.schema(columns))

    def portions(self, split: str) -> Iterator["Portion"]:
        """Yield what makes the files of a split, as the function `portions`."""
        source = still_encoded(self.sources[split])
        return portions(source, self.settings.rows_per_file, self.data.dataset)

    def portion(self, split: str, index: int) -> "Portion":
        """Return what makes one file of a split that is not streamed."""
        source = still_encoded(self.sources[split])
        return portion_of(source, index, self.settings.rows_per_file, self.data.dataset)

    def write(self, split: str, portion: "Portion") -> int:
        """Write a portion's file, if it is not there yet or the portion has grown since.

        Returns:
            Rows of the portion.

        Raises:
            SettingsError: if the file that is there was made of other rows.
        """
        features = other_columns(self.sources[split], self.tokens.source_column)
        first = portion.index * self.settings.rows_per_file
        path = code_path(self.folder, split, portion.index)
        if not path.exists():
            return self.writer.write(portion.open(), first, path, features)
        portion.keep()
        number = portion.count()
        if has_grown(portion.open, number, path, split, self.digests):
            self.writer.write(portion.open(), first, path, features)
        else:
            name_classes(path, self.writer.schema(features))
        return number


def limited(source: Source, data: DataSettings) -> Source:
    count = data.max_train_samples
    if count is None:
        return source
    if isinstance(source, datasets.IterableDataset):
        return source.take(count)
    return source.select(range(min(count, len(source))))


def other_columns(source: Source, column: str) -> datasets.Features | None:
    """Return all columns but that of the samples; None if the source does not know its columns."""
    if source.features is None:
        return None
    return datasets.Features({k: v for k, v in source.features.items() if k != column})


def still_encoded(source: Source) -> Source:
    """Media in other columns are passed on as they are, and not decoded on the way."""
    for name, feature in (source.features or {}).items():
        if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)) and feature.decode:
            source = source.cast_column(name, type(feature)(decode=False))
    return source


@dataclass
class Portion:
    """Rows of the source that make one file, still encoded.

    Attributes:
        index: number of the file.
        rows: of a dataset, to be read as often as one likes; or of a stream, to be read once.
    """

    index: int
    rows: Source | Iterator[dict] | list[dict]
    dataset: str

    def open(self) -> Iterator[dict]:
        """Read the rows."""
        return (relative_texts(row, self.dataset) for row in self.rows)

    def keep(self) -> None:
        """Hold the rows of a stream, so that they can be read again."""
        if isinstance(self.rows, Iterator):
            self.rows = list(self.rows)

    def count(self) -> int:
        """Return the number of rows; a stream is read for it, which is cheap: nothing is decoded."""
        return sum(1 for _ in self.rows) if isinstance(self.rows, Iterator) else len(self.rows)


def portion_count(source: Source, size: int) -> int:
    """Return the number of files that a source makes.

    Raises:
        SettingsError: if it is streamed, and has to be read to know.
    """
    if isinstance(source, datasets.IterableDataset):
        raise SettingsError(
            "streaming: files of codes need rows with numbers here: set it to false"
        )
    return -(-len(source) // size)


def portion_of(source: datasets.Dataset, index: int, size: int, dataset: str) -> Portion:
    """Return the rows of a source that make one file."""
    chosen = range(index * size, min(len(source), (index + 1) * size))
    return Portion(index, source.select(chosen), dataset)


def portions(source: Source, size: int, dataset: str) -> Iterator[Portion]:
    """Yield what makes the files, one after the other; of a stream each is to be read before the next."""
    if not isinstance(source, datasets.IterableDataset):
        for index in range(portion_count(source, size)):
            yield portion_of(source, index, size, dataset)
        return
    stream = iter(source)
    for index in itertools.count():
        first = next(stream, None)
        if first is None:
            return
        yield Portion(index, itertools.chain([first], itertools.islice(stream, size - 1)), dataset)
