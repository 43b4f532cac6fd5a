"""Whole training steps of the image tokenizer, ours and the published one, in turn.

  python benchmarks/whole_step.py                          K = 8,192 and 262,144, the published model, batch 4
  python benchmarks/whole_step.py --sizes 1024 --runs 7 --threads 1

Ours is the trainer's own step. The published one is written from its description: the same layers, LPIPS and
discriminator, the quantizer with all N x K distances, both optimisers, the weight average of tokenizer and
discriminator, and a list of K numbers for the codes in use, summed at every step. Its discriminator is
not frozen while the tokenizer's gradients are made. Figures are medians of several turns, ratios too.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from profile_step import make_trainer  # noqa: E402
from quantizer import Published  # noqa: E402

from training.data.images import to_values  # noqa: E402
from training.loop.trainer import Trainer  # noqa: E402

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


def compare(codebook_size: int, options: argparse.Namespace) -> str:
    """Return a row of the table: K, seconds of both, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), codebook_size, options.batch_size, "no")
        published, batches = PublishedStep(trainer), iter(trainer.batches)
        ours: list[float] = []
        theirs: list[float] = []
        for turn in tqdm(range(options.runs + 1), desc=f"K = {codebook_size:,}", unit="turn"):
            batch = next(batches)
            start = time.perf_counter()
            trainer._train_batch(batch)
            middle = time.perf_counter()
            published(batch)
            end = time.perf_counter()
            if turn:  # the first one warms up
                ours.append(middle - start)
                theirs.append(end - middle)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    medians = [statistics.median(some) for some in (ours, theirs, ratios)]
    return f"| {codebook_size:,} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[2]:.2f} |"


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
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [compare(int(size), options) for size in options.sizes.split(",")]
    print(f"batch {options.batch_size}, {torch.get_num_threads()} threads, {options.runs} turns")
    print("| K | ours, s | published, s | ratio |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
