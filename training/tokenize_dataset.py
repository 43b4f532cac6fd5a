"""Turn a data set of pictures or recordings into codes: Parquet files that load_dataset opens, and a card.

accelerate launch training/tokenize_dataset.py model=me/my-tokenizer dataset=ILSVRC/imagenet-1k output=codes
accelerate launch training/tokenize_dataset.py model=runs/mine/model dataset=path/to/photos output=codes \\
    splits=[train] flips=true

Labels, texts and ids stay beside the codes. Every file is written whole or not at all: after a kill the same
command goes on where it stopped, with any number of processes, and the result is the same to the byte.
"""

import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from hub_cards.dataset_card import make_dataset_card, push_tokens
from hub_cards.hub_commit import HubError
from hub_cards.model_card import is_hub_id
from training.audio_data import AudioDataConfig
from training.data_source import DataSettings, Source, open_splits
from training.image_data import ImageDataConfig
from training.processes import end_processes, join_processes
from training.quiet_logs import error_line, quiet_logs
from training.samples import MOST_UNREADABLE_IN_A_ROW, UnreadableSample
from training.settings import SettingsError, at_least, parse_overrides, parse_settings, setting
from training.tokens import MANIFEST, AudioTokens, ImageTokens, Variant, weights_hash


@dataclass
class TokenizeSettings:
    """The codes."""

    model: str = setting("", "tokenizer: folder, or name on the Hub")
    output: str = setting("", "folder of the codes; the same again goes on there")
    splits: list[str] = setting(["train", "validation"], "splits to take")
    batch_size: int = setting(32, "samples at a time, per process")
    rows_per_file: int = setting(8192, "rows of the source in a file; what a kill can cost")
    flips: bool = setting(False, "pictures: each once more, mirrored")
    crops: int = setting(0, "pictures: so many random crops of each in place of the centre")
    seed: int = setting(0, "draws the crops")
    push_to_hub: str | None = setting(None, "name of a data set on the Hub to publish it as")

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
        """What is made of each picture."""
        crops = range(self.crops) if self.crops else [None]
        return [
            Variant(crop, flip)
            for crop in crops
            for flip in ([False, True] if self.flips else [False])
        ]


class FileWriter:
    """Turns one split into files, each from rows [n * rows_per_file, (n + 1) * rows_per_file) of the source."""

    def __init__(self, tokens: ImageTokens | AudioTokens, settings: TokenizeSettings, workers: int):
        self.tokens, self.settings = tokens, settings
        self.samples = self.codes = 0  # made so far
        self.pool = ThreadPoolExecutor(max(1, workers))

    def write(
        self, rows: list[dict], first: int, path: Path, features: datasets.Features | None
    ) -> int:
        """Encode rows of the source and write them as one file.

        Args:
            first: number of the first row in its split.
            features: of the other columns; None if the source does not know them.

        Returns:
            Rows of the source that could not be read, which the file leaves out.
        """
        jobs = [(row, first + n, v) for n, row in enumerate(rows) for v in self.settings.variants]
        found, unreadable = [], set()
        for begin in range(0, len(jobs), self.settings.batch_size):
            batch = jobs[begin : begin + self.settings.batch_size]
            samples = list(self.pool.map(self._decode, batch))
            kept = [job for job, sample in zip(batch, samples, strict=True) if sample is not None]
            unreadable |= {job[1] for job, s in zip(batch, samples, strict=True) if s is None}
            readable = [sample for sample in samples if sample is not None]
            codes = self.tokens.encode(readable) if readable else []
            self.samples += len(codes)
            self.codes += sum(one.size for one in codes)
            for (row, number, variant), one in zip(kept, codes, strict=True):
                others = {k: v for k, v in row.items() if k != self.tokens.source_column}
                found.append(
                    others
                    | {"source_row": number}
                    | self._marks(variant)
                    | {self.tokens.column: one}
                )
        # A few rows at the end of a data set may all be broken; a whole data set, or very many, may not.
        if not found and (first == 0 or len(rows) >= MOST_UNREADABLE_IN_A_ROW):
            raise UnreadableSample(
                f"none of {len(rows)} rows can be read: does column {self.tokens.source_column!r} hold "
                f"{self.tokens.plural}?"
            )
        self._save(found, path, features)
        return len(unreadable)

    def _decode(self, job: tuple[dict, int, Variant]):
        row, number, variant = job
        try:
            return self.tokens.decode(row.get(self.tokens.source_column), number, variant)
        except UnreadableSample as error:
            logging.warning(f"skipped {error}")
            return None

    def _marks(self, variant: Variant) -> dict:
        marks = {"crop": variant.crop} if self.settings.crops else {}
        return marks | ({"flipped": variant.flipped} if self.settings.flips else {})

    def _save(self, rows: list[dict], path: Path, features: datasets.Features | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"source_row": datasets.Value("int64"), self.tokens.column: self.tokens.feature}
        own |= {"crop": datasets.Value("int32")} if self.settings.crops else {}
        own |= {"flipped": datasets.Value("bool")} if self.settings.flips else {}
        if features is None:
            inferred = datasets.Dataset.from_list(rows).features
            features = {k: v for k, v in inferred.items() if k not in own}
        order = [*features, *(k for k in own if k != self.tokens.column), self.tokens.column]
        schema = datasets.Features({k: {**features, **own}[k] for k in order})
        columns = {name: [row[name] for row in rows] for name in order}
        table = datasets.Dataset.from_dict(columns, features=schema)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        table.to_parquet(str(unfinished))
        os.replace(unfinished, path)  # a kill leaves the whole file or none


def tokenize_split(
    source: Source, split: str, writer: FileWriter, folder: Path, accelerator: Accelerator
) -> int:
    """Write the files of this process's share of a split that are not there yet; process r takes every n-th.

    Returns:
        Rows that could not be read, of those that were read now.
    """
    column = writer.tokens.source_column
    features = None
    if source.features is not None:
        features = {k: v for k, v in source.features.items() if k != column}
    size = writer.settings.rows_per_file
    streaming = isinstance(source, datasets.IterableDataset)
    total = None if streaming else len(source)
    hidden = not accelerator.is_local_main_process
    unreadable = 0
    with tqdm(total=total, desc=split, unit="row", disable=hidden) as bar:
        for index, rows in _portions(source, size):
            mine = index % accelerator.num_processes == accelerator.process_index
            path = folder / "data" / f"{split}-{index:05}.parquet"
            if mine and not path.is_file():
                taken = list(rows())
                unreadable += writer.write(taken, index * size, path, features)
            bar.update(size if total is None else min(size, total - index * size))
    return unreadable


def _portions(source: Source, size: int) -> Iterator[tuple[int, object]]:
    """Numbers of the files, and functions that give their rows."""
    if not isinstance(source, datasets.IterableDataset):
        for index in range(-(-len(source) // size)):
            chosen = range(index * size, min(len(source), (index + 1) * size))
            yield index, lambda chosen=chosen: source.select(chosen)
        return
    # A stream has to be read to know where it ends; its samples are still encoded, which is cheap.
    portion, index = [], 0
    for row in source:
        portion.append(row)
        if len(portion) == size:
            yield index, lambda rows=portion: rows
            portion, index = [], index + 1
    if portion:
        yield index, lambda: portion


def manifest(settings: TokenizeSettings, data: DataSettings, weights: str) -> dict:
    """What must be the same for two runs to make the same files."""
    own = dataclasses.asdict(settings)
    kept = {k: own[k] for k in ("splits", "batch_size", "rows_per_file", "flips", "crops", "seed")}
    kept |= {"dataset": data.dataset if is_hub_id(data.dataset) else Path(data.dataset).name}
    names = (
        "config_name",
        "revision",
        "max_train_samples",
        "resolution",
        "sampling_rate",
        "streaming",
    )
    kept |= {k: getattr(data, k) for k in names if hasattr(data, k)}
    return kept | {"weights": weights}


def run(settings: TokenizeSettings, data: DataSettings, accelerator: Accelerator) -> None:
    """Tokenize, write the card and, if asked, publish."""
    model = AutoModel.from_pretrained(settings.model).eval().to(accelerator.device)
    tokens = (AudioTokens if isinstance(data, AudioDataConfig) else ImageTokens)(
        model, data, settings.seed
    )
    if isinstance(tokens, AudioTokens) and (settings.flips or settings.crops):
        raise SettingsError("flips and crops are of pictures: sound is taken whole, as it is")
    # All of them, before hours go into the first.
    sources = [_limited(source, data) for source in open_splits(data, settings.splits, "splits")]
    if accelerator.is_main_process:
        logging.info(_counts(settings.splits, sources, data))
    folder = Path(settings.output)
    plan = manifest(settings, data, weights_hash(model))
    if accelerator.is_main_process:
        _check_manifest(folder, plan)
    accelerator.wait_for_everyone()
    writer, unreadable = FileWriter(tokens, settings, data.num_workers), 0
    start = time.perf_counter()
    for split, source in zip(settings.splits, sources, strict=True):
        unreadable += tokenize_split(source, split, writer, folder, accelerator)
    counts = torch.tensor([unreadable, writer.samples, writer.codes], device=accelerator.device)
    unreadable, samples, codes = accelerator.reduce(counts).tolist()
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        print(
            f"{samples:,} {tokens.plural} encoded in {seconds:,.1f} s by {accelerator.num_processes} "
            f"process(es): {samples / seconds:,.1f} {tokens.plural} and {codes / seconds:,.0f} codes a second"
        )
        _finish(settings, data, model, tokens, folder, unreadable)
    end_processes(accelerator)


def _limited(source: Source, data: DataSettings) -> Source:
    count = data.max_train_samples
    if count is None:
        return source
    if isinstance(source, datasets.IterableDataset):
        return source.take(count)
    return source.select(range(min(count, len(source))))


def _counts(splits: list[str], sources: list[Source], data: DataSettings) -> str:
    """How many samples each split has, for people."""
    numbers = [
        f"{data.kind.counted} streamed, length unknown"
        if isinstance(source, datasets.IterableDataset)
        else f"{len(source):,} {data.kind.counted}"
        for source in sources
    ]
    return ", ".join(f"{split}: {n}" for split, n in zip(splits, numbers, strict=True))


def _check_manifest(folder: Path, plan: dict) -> None:
    path = folder / MANIFEST
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise SettingsError(
                f"output: {path}, which tells how the codes there were made, is damaged: delete the folder, or "
                "take another"
            ) from None
        differing = [k for k in plan if before.get(k) != plan[k]]
        if differing:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {plan[k]!r}" for k in differing)
            raise SettingsError(
                f"output: {folder} holds codes of other settings ({changes}): take another"
            )
    for left in folder.glob("data/*.unfinished"):
        left.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(plan, indent=2) + "\n")
    os.replace(unfinished, path)


def _finish(settings, data, model, tokens, folder: Path, unreadable: int) -> None:
    rows, columns = {}, []
    for split in settings.splits:
        files = sorted(folder.glob(f"data/{split}-*.parquet"))
        rows[split] = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
        columns = pyarrow.parquet.read_schema(files[0]).names if files else columns
    source = data.dataset if is_hub_id(data.dataset) else None
    name = settings.push_to_hub or folder.resolve().name
    options = {"codebook_size": model.config.codebook_size, "source": source}
    tokenizer = settings.model if is_hub_id(settings.model) else Path(settings.model).resolve().name
    card = make_dataset_card(name, tokenizer, rows, columns, **options)
    (folder / "README.md").write_text(str(card))
    print(", ".join(f"{split}: {count:,} rows" for split, count in rows.items()) + f" in {folder}")
    if unreadable:
        print(f"{unreadable:,} {tokens.plural} could not be read and were left out")
    if settings.push_to_hub:
        loaded = {
            split: datasets.load_dataset(
                "parquet", data_files=str(folder / f"data/{split}-*.parquet")
            )["train"]
            for split in settings.splits
        }
        print(push_tokens(loaded, settings.push_to_hub, tokenizer, **options))


def main() -> None:
    """Command line."""
    quiet_logs()
    datasets.disable_progress_bars()
    try:
        groups = {"codes": TokenizeSettings, "data": _data_settings(sys.argv[1:])}
        groups = parse_settings(groups, __doc__)
        run(groups["codes"], groups["data"], join_processes())
    except (SettingsError, HubError, ValueError, OSError) as error:
        sys.exit(error_line(error))


def _data_settings(words: list[str]) -> type[DataSettings]:
    """Those of the modality of the model that the command line names."""
    model = parse_overrides([w for w in words if w not in ("-h", "--help")]).get("model")
    if model and AutoConfig.from_pretrained(str(model)).model_type == "simvq_audio":
        return AudioDataConfig
    return ImageDataConfig


if __name__ == "__main__":
    main()
