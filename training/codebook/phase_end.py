"""When a phase without quantization has done its work (after arXiv 2605.06870)."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from modeling_simvq.straight_through import to_rows
from training.runtime.step_window import StepWindow

# Looks at the model over the longest phase; the phase ends after so many without a gain of so much.
LOOKS, PATIENCE, GAIN = 20, 3, 0.01


class GaussianCode:
    """The best code of so many bits for Gaussian latents, as a channel: what it leaves of them.

    Reverse water-filling: directions whose variance v is above a level get log2(v / level) / 2 bits and the
    error `level`; those below get none and are lost. It is a bound, which needs no codebook.

    Args:
        mean, covariance: of the latents, (d,) and (d, d) float64.
        bits: of a latent's code.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, bits: float):
        self.mean = mean
        variances, self.directions = torch.linalg.eigh(covariance)
        self.variances = variances.clamp(min=1e-12 * float(variances[-1].clamp(min=1e-300)))
        logs = self.variances.log2().flip(0)
        # With the first n directions above the level, its logarithm is their mean less 2 bits / n.
        levels = (logs.cumsum(0) - 2 * bits) / torch.arange(1, len(logs) + 1, dtype=logs.dtype)
        self.reached = int((logs > levels).cummin(dim=0).values.sum())
        self.level = float(levels[self.reached - 1].exp2())

    @property
    def kept(self) -> Tensor:
        """Share of each direction's variance (d,) that the code keeps."""
        return (1 - self.level / self.variances).clamp(min=0)

    def __call__(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (B, d, *spatial) as the code leaves them, with the error of each direction."""
        kept = self.kept
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        spread = (kept * self.level).clamp(min=0).sqrt()
        keep, spread = (
            (self.directions * scale @ self.directions.T).to(latents) for scale in (kept, spread)
        )
        mean = self.mean.to(latents).view(-1, *[1] * (latents.ndim - 2))
        centred = (latents - mean).movedim(1, -1)
        coded = centred @ keep + noise.movedim(1, -1).to(latents) @ spread
        return coded.movedim(-1, 1) + mean


class PhaseEnd:
    """Ends a phase when the loss that quantization will leave, by the theory, does not fall any more.

    A short phase leaves latents of few directions, which is where the codebook's rank stays; a long one leaves
    more of them than the codes' bits can reach.

    Args:
        bits: that a latent's codes have.
        width: d.
        longest: steps that the phase may take.
    """

    def __init__(self, bits: float, width: int, longest: int, accelerator: Accelerator):
        self.bits, self.accelerator = bits, accelerator
        self.every = max(1, longest // LOOKS)
        self.moments = torch.zeros(width + 1, width + 1, device=accelerator.device)
        self.best, self.since = float("inf"), 0
        self._window = StepWindow(self._add)
        self._last: tuple[Tensor, Tensor] | None = None  # of the last batch that counts

    def note(self, inputs: Tensor, latents: Tensor) -> None:
        """Take note of a batch and its latents (B, d, *spatial); they count when the step is settled."""
        self._window.note((inputs, latents))

    def settle(self, skipped: bool) -> None:
        """End a step."""
        self._window.settle(skipped)

    @torch.no_grad()
    def _add(self, told: tuple[Tensor, Tensor]) -> None:
        self._last = told
        rows = to_rows(told[1].float())
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self.moments += rows.T @ rows

    @torch.no_grad()
    def due(self, step: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Tell whether the phase ends after so many steps. A collective call where one looks.

        Args:
            loss_of: the model's loss () on inputs when these latents are decoded.
        """
        # A resumed run has no batch until it has taken a step.
        if step % self.every or self._last is None:
            return False
        moments = self.accelerator.reduce(self.moments.clone(), reduction="sum").cpu().double()
        self.moments.zero_()
        count = float(moments[-1, -1])
        if count == 0 or not moments.isfinite().all():
            return False
        mean = moments[-1, :-1] / count
        covariance = moments[:-1, :-1] / count - torch.outer(mean, mean)
        inputs, latents = self._last
        code = GaussianCode(mean, covariance, self.bits)
        loss = loss_of(inputs, code(latents, torch.Generator(latents.device).manual_seed(step)))
        loss = float(self.accelerator.reduce(loss.detach().clone(), reduction="mean"))
        gained = loss < (1 - GAIN) * self.best
        self.since = 0 if gained else self.since + 1
        self.best = min(self.best, loss)
        return self.since >= PATIENCE

    def state_dict(self) -> dict:
        """Return what this rank keeps."""
        return {"moments": self.moments, "best": self.best, "since": self.since}

    def load_state_dict(self, state: dict) -> None:
        self.moments.copy_(state["moments"])
        self.best, self.since = state["best"], state["since"]
