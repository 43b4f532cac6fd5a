"""Codes that nobody picks are put where latents are (as NSVQ, arXiv 2606.11363, and DiVeQ do)."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_simvq.straight_through import to_rows
from training.codebook.drift import check_trained, trained_table
from training.codebook.usage import CodeCounter
from training.runtime.settings import SettingsError
from training.runtime.step_window import StepWindow


class CodeReplacement:
    """Counts codes, and every few steps puts those without a latent on latents of the last step, at random.

    The optimiser's moments of such a code are zeroed: they are of the place that it left.

    Args:
        quantizers: of the trained model and of the average, which follows.
        optimizer: of the trained model.
        every: steps between replacements.

    Raises:
        SettingsError: if the quantizer has no trained table of codes, or this run does not train it.
    """

    def __init__(
        self, quantizers: list[nn.Module], optimizer, every: int, accelerator: Accelerator
    ):
        self.tables = [trained_table(quantizer) for quantizer in quantizers]
        if None in self.tables:
            raise SettingsError(
                "replace_unused_every: only a trained table of codes can be replaced: it takes the quantizers "
                "vq, diveq and ibq, and one of them"
            )
        check_trained("replace_unused_every", every, quantizers[0])
        self.optimizer, self.every, self.accelerator = optimizer, every, accelerator
        self.width = quantizers[0].codebook_dim
        self.counter = CodeCounter(quantizers[0].codebook_size, accelerator.device)
        self._window = StepWindow(self._count)
        self._latents: Tensor | None = None

    def note(self, codes: Tensor, latents: Tensor) -> None:
        """Take note of a forward pass; it counts when its step is settled."""
        self._window.note((codes, latents))

    def _count(self, told: tuple[Tensor, Tensor]) -> None:
        codes, self._latents = told
        self.counter.update(codes)

    def settle(self, skipped: bool, step: int) -> int:
        """End a step; where one is due, replace codes.

        Args:
            step: steps taken, this one included.

        Returns:
            Number of codes that were replaced.
        """
        self._window.settle(skipped)
        if step % self.every or self._latents is None:
            return 0
        counts = self.accelerator.reduce(self.counter.counts.clone(), reduction="sum")
        self.counter.reset()
        unused = (counts == 0).nonzero()[:, 0].cpu()
        rows = self.accelerator.gather(to_rows(self._latents.float())).cpu()
        # The same choice on all ranks, and in a run that was resumed here.
        generator = torch.Generator().manual_seed(step)
        chosen = rows[torch.randint(len(rows), (len(unused),), generator=generator)]
        self._put(unused.to(counts.device), chosen.to(counts.device))
        return len(unused)

    @torch.no_grad()
    def _put(self, places: Tensor, rows: Tensor) -> None:
        for table in self.tables:
            table.view(-1, self.width)[places] = rows.to(table.dtype)
        for moment in self.optimizer.state[self.tables[0]].values():
            if isinstance(moment, Tensor) and moment.shape == self.tables[0].shape:
                moment.view(-1, self.width)[places] = 0
