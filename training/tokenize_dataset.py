"""Turn a dataset of images or recordings into codes: Parquet files that load_dataset opens, and a card.

accelerate launch training/tokenize_dataset.py model=me/my-tokenizer dataset=ILSVRC/imagenet-1k output=codes
accelerate launch training/tokenize_dataset.py model=runs/mine/model dataset=path/to/photos output=codes \\
    splits=[train] flips=true

Labels, texts and ids stay beside the codes. Every file is written whole or not at all: after a kill the same
command continues where it stopped, with any number of processes; the result is the same to the byte. It takes
rows too that were added at the end of the dataset since, and classes behind the others; where rows that are
done or their classes have changed, it refuses.
"""

import logging
import sys
import time
from pathlib import Path

# `accelerate launch` puts this file's folder on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import pyarrow.parquet
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import modeling_simvq  # noqa: F401  (registers the models)
from hub_cards.dataset_card import content_digest, make_dataset_card, push_code_files
from hub_cards.tokenizer_card import is_hub_id
from training.data.source import DataSettings, Source
from training.runtime.console import command
from training.runtime.folder_lock import hold_folder
from training.runtime.shared_folder import check_shared
from training.tokenization.code_files import clear_unfinished, list_code_files
from training.tokenization.earlier_files import check_length
from training.tokenization.job import Job, TokenizeSettings, choose_groups
from training.tokenization.manifest import account_for, check_manifest, write_manifest


def tokenize_split(job: Job, split: str, accelerator: Accelerator) -> int:
    """Write the files of this process's share of a split that are not there yet; process r takes every n-th.

    Returns:
        Rows of the source.

    Raises:
        SettingsError: if a file that is there was made of other rows than the source has there now.
    """
    source, size = job.sources[split], job.settings.rows_per_file
    total = None if isinstance(source, datasets.IterableDataset) else len(source)
    there = list_code_files(job.folder, split)
    if total is not None:
        check_length(total, there, size, job.folder, split)
    count, hidden = 0, not accelerator.is_local_main_process
    with tqdm(total=total, desc=split, unit="row", disable=hidden) as bar:
        for portion in job.portions(split):
            own = portion.index % accelerator.num_processes == accelerator.process_index
            number = job.write(split, portion) if own else portion.count()
            count += number
            bar.update(number)
    check_length(count, there, size, job.folder, split)
    return count


def run(settings: TokenizeSettings, data: DataSettings, accelerator: Accelerator) -> None:
    """Tokenize, write the card and, if asked, publish."""
    job = Job(settings, data, accelerator.device)
    check_shared(accelerator, job.folder, "output")
    if accelerator.is_main_process:
        logging.info(_counts(job.sources, data))
    with hold_folder(job.folder, "output", accelerator):
        _tokenize(job, accelerator)


def _tokenize(job: Job, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        check_manifest(job.folder, job.plan)
        clear_unfinished(job.folder, job.settings.splits)
    accelerator.wait_for_everyone()
    job.check_columns()
    start = time.perf_counter()
    counts = {split: tokenize_split(job, split, accelerator) for split in job.sources}
    made = torch.tensor([job.writer.samples, job.writer.codes], device=accelerator.device)
    samples, codes = accelerator.reduce(made).tolist()
    if accelerator.is_main_process:
        seconds, plural = time.perf_counter() - start, job.tokens.plural
        print(
            f"{samples:,} {plural} encoded in {seconds:,.1f} s by {accelerator.num_processes} "
            f"process(es): {samples / seconds:,.1f} {plural} and {codes / seconds:,.0f} codes a second"
        )
        _finish(job, counts)


def _counts(sources: dict[str, Source], data: DataSettings) -> str:
    """Describe how many samples each split has."""
    numbers = {
        split: f"{data.kind.counted} streamed, length unknown"
        if isinstance(source, datasets.IterableDataset)
        else data.kind.count(len(source))
        for split, source in sources.items()
    }
    return ", ".join(f"{split}: {number}" for split, number in numbers.items())


def _finish(job: Job, counts: dict[str, int]) -> None:
    settings, data, folder = job.settings, job.data, job.folder
    sources, rows, columns, unreadable = {}, {}, [], 0
    files = {split: list(list_code_files(folder, split).values()) for split in counts}
    for split, count in counts.items():
        sources[split], rows[split], left_out = account_for(folder, split, count)
        unreadable += left_out
        if files[split]:
            columns = pyarrow.parquet.read_schema(files[split][0]).names
    write_manifest(folder, job.plan | {"source": sources})
    source = data.dataset if is_hub_id(data.dataset) else None
    name = settings.push_to_hub or folder.resolve().name
    options = {
        "codebook_size": job.model.config.codebook_size,
        "num_quantizers": settings.num_quantizers,
        "of_quantizers": job.model.config.num_quantizers,
        "source": source,
    }
    tokenizer = settings.model if is_hub_id(settings.model) else Path(settings.model).resolve().name
    digest = content_digest(path for paths in files.values() for path in paths)
    card = make_dataset_card(name, tokenizer, rows, columns, digest=digest, **options)
    (folder / "README.md").write_text(str(card))
    print(", ".join(f"{split}: {count:,} rows" for split, count in rows.items()) + f" in {folder}")
    if unreadable:
        print(f"{unreadable:,} {job.tokens.plural} could not be read and were left out")
    if settings.push_to_hub:
        print(push_code_files(files, settings.push_to_hub, tokenizer, **options))


def main() -> None:
    """Command line."""
    datasets.disable_progress_bars()
    command(choose_groups, run, __doc__)


if __name__ == "__main__":
    main()
