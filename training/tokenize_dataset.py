"""Turn a dataset of images or recordings into codes: Parquet files that load_dataset opens, and a card.

accelerate launch training/tokenize_dataset.py model=me/my-tokenizer dataset=ILSVRC/imagenet-1k output=codes
accelerate launch training/tokenize_dataset.py model=runs/mine/model dataset=path/to/photos output=codes \\
    splits=[train] flips=true

Labels, texts and ids stay beside the codes. Every file is written whole or not at all: after a kill the same
command continues where it stopped, with any number of processes; the result is the same to the byte. It takes
rows too that were added at the end of the dataset since, and classes behind the others; where rows that are
done or their classes have changed, it refuses.
"""

import itertools
import logging
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import pyarrow.parquet
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel

import modeling_simvq  # noqa: F401  (registers the models)
from hub_cards.dataset_card import content_digest, make_dataset_card, push_code_files
from hub_cards.tokenizer_card import is_hub_id
from training.data.images import ImageDataConfig
from training.data.recordings import AudioDataConfig
from training.data.source import DataSettings, Source, open_splits
from training.evaluation.evaluated_data import EvaluatedImages, at_trained_resolution
from training.runtime.console import command
from training.runtime.folder_lock import hold_folder
from training.runtime.settings import (
    SettingsError,
    at_least,
    parse_overrides,
    setting,
)
from training.runtime.shared_folder import check_shared
from training.tokenization.code_files import (
    RowDigests,
    clear_unfinished,
    code_path,
    list_code_files,
    relative_texts,
)
from training.tokenization.earlier_files import (
    check_columns,
    check_length,
    has_grown,
    name_classes,
)
from training.tokenization.encoders import AudioTokens, ImageTokens, Variant, weights_hash
from training.tokenization.file_writer import FileWriter
from training.tokenization.manifest import account_for, check_manifest, make_plan, write_manifest


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
    push_to_hub: str | None = setting(None, "name of a dataset on the Hub to publish it as")

    def __post_init__(self):
        at_least(self, 1, "batch_size", "rows_per_file")
        at_least(self, 0, "crops")
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


def tokenize_split(
    source: Source,
    split: str,
    writer: FileWriter,
    folder: Path,
    accelerator: Accelerator,
    dataset: str,
    size: int,
) -> int:
    """Write the files of this process's share of a split that are not there yet; process r takes every n-th.

    Args:
        dataset: folder or name of the source.
        size: rows of the source in a file: the n-th holds rows [n * size, (n + 1) * size).

    Returns:
        Rows of the source.

    Raises:
        SettingsError: if a file that is there was made of other rows than the source has there now.
    """
    features = _other_columns(source, writer.tokens.source_column)
    source = _still_encoded(source)
    streaming = isinstance(source, datasets.IterableDataset)
    total = None if streaming else len(source)
    hidden = not accelerator.is_local_main_process
    there = list_code_files(folder, split)
    if total is not None:
        check_length(total, there, size, folder, split)
    count = 0
    with tqdm(total=total, desc=split, unit="row", disable=hidden) as bar:
        for portion in _portions(source, size, dataset):
            index = portion.index
            if index % accelerator.num_processes != accelerator.process_index:
                number = portion.count()
            elif index not in there:
                path = code_path(folder, split, index)
                number = writer.write(portion.open(), index * size, path, features)
            else:
                portion.keep()
                number, path = portion.count(), there[index]
                if has_grown(portion.open, number, path, split, writer.digests):
                    writer.write(portion.open(), index * size, path, features)
                else:
                    name_classes(path, writer.schema(features))
            count += number
            bar.update(number)
    check_length(count, there, size, folder, split)
    return count


def _other_columns(source: Source, column: str) -> datasets.Features | None:
    """Return all columns but that of the samples; None if the source does not know its columns."""
    if source.features is None:
        return None
    return datasets.Features({k: v for k, v in source.features.items() if k != column})


def _still_encoded(source: Source) -> Source:
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


def _portions(source: Source, size: int, dataset: str) -> Iterator[Portion]:
    """Yield what makes the files, one after the other; of a stream each is to be read before the next."""
    if not isinstance(source, datasets.IterableDataset):
        for index in range(-(-len(source) // size)):
            chosen = range(index * size, min(len(source), (index + 1) * size))
            yield Portion(index, source.select(chosen), dataset)
        return
    stream = iter(source)
    for index in itertools.count():
        first = next(stream, None)
        if first is None:
            return
        yield Portion(index, itertools.chain([first], itertools.islice(stream, size - 1)), dataset)


def run(settings: TokenizeSettings, data: DataSettings, accelerator: Accelerator) -> None:
    """Tokenize, write the card and, if asked, publish."""
    model = AutoModel.from_pretrained(settings.model).eval().to(accelerator.device)
    if isinstance(data, ImageDataConfig):
        at_trained_resolution(data, settings.model)
    tokens = (AudioTokens if isinstance(data, AudioDataConfig) else ImageTokens)(
        model, data, settings.seed
    )
    if isinstance(tokens, AudioTokens) and (settings.flips or settings.crops):
        raise SettingsError(
            "flips and crops are for images: recordings are taken whole, as they are"
        )
    folder = Path(settings.output)
    check_shared(accelerator, folder, "output")
    # All of them, before hours go into the first.
    sources = [_limited(source, data) for source in open_splits(data, settings.splits, "splits")]
    if accelerator.is_main_process:
        logging.info(_counts(settings.splits, sources, data))
    with hold_folder(folder, "output", accelerator):
        _tokenize(settings, data, model, tokens, sources, accelerator)


def _tokenize(
    settings: TokenizeSettings, data: DataSettings, model, tokens, sources: list, accelerator
) -> None:
    plan = make_plan(settings, data, weights_hash(model))
    folder = Path(settings.output)
    if accelerator.is_main_process:
        check_manifest(folder, plan)
        clear_unfinished(folder, settings.splits)
    accelerator.wait_for_everyone()
    digests, counts = RowDigests(tokens.source_column, data.dataset), {}
    writer = FileWriter(tokens, settings.variants, settings.batch_size, digests, data.num_workers)
    for split, source in zip(settings.splits, sources, strict=True):
        columns = _other_columns(source, tokens.source_column)
        check_columns(folder, split, writer.schema(columns))
    start = time.perf_counter()
    for split, source in zip(settings.splits, sources, strict=True):
        counts[split] = tokenize_split(
            source, split, writer, folder, accelerator, data.dataset, settings.rows_per_file
        )
    made = torch.tensor([writer.samples, writer.codes], device=accelerator.device)
    samples, codes = accelerator.reduce(made).tolist()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        print(
            f"{samples:,} {tokens.plural} encoded in {seconds:,.1f} s by {accelerator.num_processes} "
            f"process(es): {samples / seconds:,.1f} {tokens.plural} and {codes / seconds:,.0f} codes a second"
        )
        _finish(settings, data, model, tokens, folder, plan, counts)


def _limited(source: Source, data: DataSettings) -> Source:
    count = data.max_train_samples
    if count is None:
        return source
    if isinstance(source, datasets.IterableDataset):
        return source.take(count)
    return source.select(range(min(count, len(source))))


def _counts(splits: list[str], sources: list[Source], data: DataSettings) -> str:
    """Describe how many samples each split has."""
    numbers = [
        f"{data.kind.counted} streamed, length unknown"
        if isinstance(source, datasets.IterableDataset)
        else data.kind.count(len(source))
        for source in sources
    ]
    return ", ".join(f"{split}: {n}" for split, n in zip(splits, numbers, strict=True))


def _finish(settings, data, model, tokens, folder: Path, plan: dict, counts: dict) -> None:
    sources, rows, columns, unreadable = {}, {}, [], 0
    files = {split: list(list_code_files(folder, split).values()) for split in counts}
    for split, count in counts.items():
        sources[split], rows[split], left_out = account_for(folder, split, count)
        unreadable += left_out
        if files[split]:
            columns = pyarrow.parquet.read_schema(files[split][0]).names
    write_manifest(folder, plan | {"source": sources})
    source = data.dataset if is_hub_id(data.dataset) else None
    name = settings.push_to_hub or folder.resolve().name
    options = {"codebook_size": model.config.codebook_size, "source": source}
    tokenizer = settings.model if is_hub_id(settings.model) else Path(settings.model).resolve().name
    digest = content_digest(path for paths in files.values() for path in paths)
    card = make_dataset_card(name, tokenizer, rows, columns, digest=digest, **options)
    (folder / "README.md").write_text(str(card))
    print(", ".join(f"{split}: {count:,} rows" for split, count in rows.items()) + f" in {folder}")
    if unreadable:
        print(f"{unreadable:,} {tokens.plural} could not be read and were left out")
    if settings.push_to_hub:
        print(push_code_files(files, settings.push_to_hub, tokenizer, **options))


def main() -> None:
    """Command line."""
    datasets.disable_progress_bars()
    command(choose_groups, run, __doc__)


def choose_groups(words: list[str]) -> tuple[dict[str, type], list[str]]:
    """Choose the data settings by the modality of the model that the command line names."""
    model = parse_overrides([w for w in words if w not in ("-h", "--help")]).get("model")
    audio = model and AutoConfig.from_pretrained(str(model)).model_type == "simvq_audio"
    return {
        "settings": TokenizeSettings,
        "data": AudioDataConfig if audio else EvaluatedImages,
    }, words


if __name__ == "__main__":
    main()
