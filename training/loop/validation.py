"""One pass over a validation set, the same for every modality."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from training.codebook.usage import CodeCounter

logger = get_logger(__name__)

Measured = tuple[dict[str, Tensor], Tensor]


@torch.no_grad()
def measured_batches(
    loader: DataLoader,
    accelerator: Accelerator,
    measure: Callable[[dict[str, Tensor]], Measured],
    desc: str,
) -> Iterator[tuple[dict[str, Tensor], Tensor, int]]:
    """Measure the samples of all ranks, each once; tell codes too, and how many cannot be read.

    Args:
        loader: prepared; batches have "valid", (B,) bool, false for samples that could not be read, or only
            fill up the batch, and "unreadable", (B,) int64, 1 for the former.
        measure: maps a batch to figures, each (B, ...), and codes (B, ...).

    Yields:
        The same on all ranks, batch after batch, without what could not be read.
    """
    hidden = not accelerator.is_local_main_process
    for batch in tqdm(loader, desc=desc, unit="batch", leave=False, disable=hidden):
        per_sample, codes = measure(batch)
        # gather_for_metrics drops the samples that fill up the last batch of all ranks.
        gathered = accelerator.gather_for_metrics(
            {
                **per_sample,
                "codes": codes,
                "valid": batch["valid"],
                "unreadable": batch["unreadable"],
            }
        )
        valid = gathered.pop("valid")
        codes = gathered.pop("codes")[valid]
        unreadable = int(gathered.pop("unreadable").sum())
        yield {name: values[valid] for name, values in gathered.items()}, codes, unreadable


@torch.no_grad()
def each_once(
    loader: DataLoader, accelerator: Accelerator, desc: str
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield this rank's part of the readable samples of a validation set: over all ranks each comes once.

    For figures that are no plain means over samples; their sums are the caller's to reduce. What cannot be read
    is warned of at the end.

    Args:
        loader: prepared; batches have "valid", (B,) bool, false for samples that could not be read, or only
            fill up the batch, and "unreadable", (B,) int64, 1 for the former.

    Yields:
        A batch, and whether it counts: a rank that has nothing left of one gets a sample that does not, because
        a model sharded needs all ranks to call it.
    """
    hidden = not accelerator.is_local_main_process
    unreadable = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for batch in tqdm(loader, desc=desc, unit="batch", leave=False, disable=hidden):
        size = len(batch["valid"])
        own = torch.arange(size, device=accelerator.device) + size * accelerator.process_index
        # gather_for_metrics drops the samples that fill up the last batch of all ranks.
        real = torch.isin(own, accelerator.gather_for_metrics(own))
        kept = real & batch["valid"]
        unreadable += (batch["unreadable"] * real).sum()
        counts = bool(kept.any())
        if not counts:
            kept = torch.arange(size, device=kept.device) == 0
        yield {name: values[kept] for name, values in batch.items()}, counts
    _warn_of(int(accelerator.reduce(unreadable)))


def _warn_of(unreadable: int) -> None:
    if unreadable:
        logger.warning(
            f"{unreadable} samples of the validation set cannot be read and are left out"
        )


def run_validation(
    loader: DataLoader,
    accelerator: Accelerator,
    config: PreTrainedConfig,
    measure: Callable[[dict[str, Tensor]], Measured],
) -> dict[str, float]:
    """Return means of per-sample figures, utilisation and perplexity, over all ranks.

    Args:
        loader, measure: as of measured_batches, figures (B,).
        config: of the tokenizer, which says how many codes there are, and how many a position has.

    Returns:
        Figures, equal on all ranks; empty if no sample was valid.
    """
    counter = CodeCounter(config.codebook_size, accelerator.device, config.num_quantizers)
    figures: dict[str, list[Tensor]] = {}
    left_out = 0
    for per_sample, codes, unreadable in measured_batches(
        loader, accelerator, measure, "validating"
    ):
        left_out += unreadable
        if accelerator.is_main_process:  # every rank has gathered the same codes
            counter.update(codes)
        for name, values in per_sample.items():
            figures.setdefault(name, []).append(values)
    _warn_of(left_out)
    usage = counter.read(accelerator)
    if usage.tokens == 0:
        logger.warning("the validation set has no sample that can be read: no figures")
        return {}
    means = {name: float(torch.cat(values).mean()) for name, values in figures.items()}
    return means | usage.metrics()
