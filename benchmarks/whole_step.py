"""Whole training steps of the image tokenizer, ours and the published one, in turn.

  python benchmarks/whole_step.py                          K = 8,192 and 262,144, the published model, batch 4
  python benchmarks/whole_step.py --sizes 1024 --runs 7 --threads 1

Ours is the trainer's own step. The published one is written from its description: the same layers, LPIPS and
discriminator, the quantizer with all N x K distances, both optimisers, the weight average of tokenizer and
discriminator, and a list of K numbers for the codes in use, summed at every step. Its discriminator is
not frozen while the tokenizer's gradients are made. Each kind has a process of its own; they take turns.

Our commands keep freed memory on a CPU (training/runtime/kept_memory.py). The published step is also timed
with that, so that the rest of the ratio can be seen. Figures are medians of several turns, ratios too.
"""

import argparse
import copy
import ctypes
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from profile_step import make_trainer  # noqa: E402
from quantizer import Published  # noqa: E402
from turns import take_turns  # noqa: E402

from training.data.images import to_values  # noqa: E402
from training.loop.trainer import Trainer  # noqa: E402
from training.runtime.kept_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD  # noqa: E402

KINDS = ("ours", "published", "published, memory kept")
RATE, BETAS, DECAY = 1e-4, (0.5, 0.9), 0.999


class PublishedStep:
    """The published training step, on copies of a trainer's modules."""

    def __init__(self, trainer: Trainer):
        recipe = trainer.recipe
        model = copy.deepcopy(recipe.model)
        config = model.config
        self.encoder, self.decoder = model.encoder, model.decoder
        self.quantizer = Published(config.codebook_size, config.codebook_dim)
        self.discriminator = copy.deepcopy(recipe.discriminator).requires_grad_(True)
        self.perceptual = recipe.perceptual
        tokenizer = nn.ModuleList([self.encoder, self.decoder, self.quantizer])
        trained = [p for p in tokenizer.parameters() if p.requires_grad]
        self.averaged = [*trained, *self.discriminator.parameters()]
        self.average = [p.detach().clone() for p in self.averaged]
        self.optimizers = [
            torch.optim.Adam(parameters, RATE, BETAS)
            for parameters in (trained, self.discriminator.parameters())
        ]
        self.used = [0] * config.codebook_size

    def __call__(self, batch: dict[str, Tensor]) -> None:
        images = to_values(batch["pixel_values"])
        of_tokenizer, of_discriminator = self.optimizers
        latents, codes, commitment = self.quantizer(self.encoder(images))
        decoded = self.decoder(latents)
        nll = (images - decoded).abs().mean() + self.perceptual(images, decoded).mean()
        judged = F.softplus(-self.discriminator(decoded).mean(dim=(1, 2, 3))).mean()
        of_tokenizer.zero_grad()
        (nll + 0.1 * judged + commitment).backward()
        of_tokenizer.step()
        real, fake = self.discriminator(images), self.discriminator(decoded.detach())
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        of_discriminator.step()
        of_discriminator.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(self.average, self.averaged, strict=True):
                mean.sub_((1 - DECAY) * (mean - parameter))
        for code in codes.flatten().tolist():
            self.used[code] = 1
        sum(self.used)


def serve(
    kind: str, codebook_size: int, batch_size: int, threads: int | None, pipe: Connection
) -> None:
    """Make steps of one kind in this process, one for each question, and answer with its seconds."""
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), codebook_size, batch_size, "no")  # keeps freed memory
        step = trainer._train_batch if kind == "ours" else PublishedStep(trainer)
        if kind == "published":
            leave_memory_as_usual()
        batches = iter(trainer.batches)
        while pipe.recv():
            batch, start = next(batches), time.perf_counter()
            step(batch)
            pipe.send((time.perf_counter() - start, torch.get_num_threads()))


def leave_memory_as_usual() -> None:
    """Return to glibc's own thresholds, which the published code leaves as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # where its adaptive threshold ends
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def compare(codebook_size: int, options: argparse.Namespace) -> str:
    """Return a row of the table: K, the seconds of each kind, and ours against each of the others."""
    servers = {
        kind: (serve, (kind, codebook_size, options.batch_size, options.threads)) for kind in KINDS
    }
    answers = take_turns(servers, options.runs, f"K = {codebook_size:,}")
    options.threads = answers["ours"][-1][1]
    seconds = {kind: [taken for taken, _ in some] for kind, some in answers.items()}
    figures = [statistics.median(some) for some in seconds.values()]
    for kind in KINDS[1:]:
        pairs = zip(seconds["ours"], seconds[kind], strict=True)
        figures.append(statistics.median(theirs / ours for ours, theirs in pairs))
    return f"| {codebook_size:,} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="8192,262144", help="codebook sizes K")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="turns that count")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    options = parser.parse_args()
    rows = [compare(int(size), options) for size in options.sizes.split(",")]
    print(f"batch {options.batch_size}, {options.threads} threads, {options.runs} turns")
    print("| K | " + ", s | ".join(KINDS) + ", s | ratio | ratio, memory kept |")
    print("|---" * 6 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
