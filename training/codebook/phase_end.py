"""When a phase without quantization has done its work (after arXiv 2605.06870)."""

import torch
from accelerate import Accelerator
from torch import Tensor

# Steps between two looks at the latents, and looks without a rise after which the phase ends.
EVERY, PATIENCE = 50, 3


def reached_directions(covariance: Tensor, bits: float) -> int:
    """Return how many directions of Gaussian latents so many bits reach, by reverse water-filling.

    A direction of variance v gets log2(v / level) / 2 bits where v is above the level, and none below. The
    paper predicts by it what quantization will leave of an autoencoder's latents.

    Args:
        covariance: (d, d).
        bits: that a latent's code has, log2 K.
    """
    variances = torch.linalg.eigvalsh(covariance.double()).clamp(min=0).flip(0)
    variances = variances[variances > 1e-12 * variances[0].clamp(min=1e-300)]
    logs = variances.log2()
    sums = logs.cumsum(dim=0)
    counts = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    # With the first n directions above the level, its logarithm is their mean less 2 bits / n.
    levels = (sums - 2 * bits) / counts
    return int((logs > levels).cummin(dim=0).values.sum())


class PhaseEnd:
    """Ends a phase when the directions that the codes' bits can reach do not become more.

    A short phase leaves latents of few directions, which is where the codebook's rank stays; a long one takes
    steps from the training with quantization.

    Args:
        bits: that a latent's codes have.
        width: d.
    """

    def __init__(self, bits: float, width: int, accelerator: Accelerator):
        self.bits, self.accelerator = bits, accelerator
        self.moments = torch.zeros(width + 1, width + 1, device=accelerator.device)
        self.best, self.since = 0, 0

    @torch.no_grad()
    def note(self, latents: Tensor) -> None:
        """Take from the latents (B, d, *spatial) of a step that was taken."""
        rows = latents.float().movedim(1, -1).flatten(0, -2)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self.moments += rows.T @ rows

    def due(self, step: int) -> bool:
        """Tell whether the phase ends after so many steps. A collective call at every 50th."""
        if step % EVERY:
            return False
        moments = self.accelerator.reduce(self.moments.clone(), reduction="sum").cpu().double()
        self.moments.zero_()
        count = float(moments[-1, -1])
        if count == 0 or not moments.isfinite().all():
            return False
        mean = moments[-1, :-1] / count
        covariance = moments[:-1, :-1] / count - torch.outer(mean, mean)
        reached = reached_directions(covariance, self.bits)
        self.since = 0 if reached > self.best else self.since + 1
        self.best = max(self.best, reached)
        return self.since >= PATIENCE

    def state_dict(self) -> dict:
        """Return what this rank keeps."""
        return {"moments": self.moments, "best": self.best, "since": self.since}

    def load_state_dict(self, state: dict) -> None:
        self.moments.copy_(state["moments"])
        self.best, self.since = state["best"], state["since"]
