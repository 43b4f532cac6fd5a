"""Reports of the steps: means over a window, to the trackers and as a line for people."""

import sys
import time

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor

from training.loop.batches import Progress
from training.loop.recipe import Recipe

logger = get_logger(__name__)


class FigureMeans:
    """Means of figures and sums of counts over a window, kept on the device until they are read."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> None:
        """Add the figures of one forward pass.

        Args:
            weights: of figures that do not count as much as the same of other passes, by name.
        """
        for name, value in figures.items():
            weight = (weights or {}).get(name, 1)
            value = value.detach().float() * weight
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._numbers[name] = self._numbers.get(name, 0) + weight

    def count(self, name: str, number: Tensor) -> None:
        """Add to a count."""
        self._counts[name] = self._counts[name] + number if name in self._counts else number

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, int]]:
        """Means and counts over all ranks since the last read; no means if every step was skipped."""
        names, device, figures = sorted(self._sums), accelerator.device, {}
        if names:
            sums = [self._sums[name].to(device) for name in names]
            numbers = [
                torch.as_tensor(self._numbers[name], dtype=torch.float32, device=device)
                for name in names
            ]
            sums, numbers = accelerator.reduce(
                torch.stack([torch.stack(sums), torch.stack(numbers)]), reduction="sum"
            )
            figures = dict(zip(names, (sums / numbers).tolist(), strict=True))
        counts = {
            name: int(accelerator.reduce(number.to(device, copy=True), reduction="sum"))
            for name, number in sorted(self._counts.items())
        }
        self._clear()
        return figures, counts

    def state_dict(self) -> dict:
        return {"sums": self._sums, "numbers": self._numbers, "counts": self._counts}

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._numbers = state["sums"], state["numbers"]
        self._counts = state["counts"]


class Reports:
    """Figures of the steps between two reports.

    Args:
        progress: whose counts of broken samples are kept here.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, progress: Progress):
        self.recipe, self.accelerator, self.progress = recipe, accelerator, progress
        self.means = FigureMeans()
        # Without a terminal a bar is noise: the figures come as lines of the log.
        self.plain_log = not sys.stderr.isatty()

    def start(self) -> None:
        """Measure the time of steps from here on."""
        self._clock, self._step = time.perf_counter(), self.progress.step

    def send(self, more: dict[str, float], remark: str, waited: float) -> str:
        """Send the figures since the last report to the trackers, and return a line of them for people.

        Args:
            more: figures beside the means of the steps' own, among them run/learning_rate.
            remark: a word for the line.
            waited: seconds that this process has waited for data.
        """
        progress = self.progress
        figures, counts = self.means.read(self.accelerator)
        elapsed, steps = time.perf_counter() - self._clock, progress.step - self._step
        self.start()
        for name, count in counts.items():
            progress.skipped[name] = progress.skipped.get(name, 0) + count
            if count:
                logger.warning(
                    f"{name}: {count} samples since the last report, {progress.skipped[name]} in all"
                )
            figures[f"data/{name}"] = progress.skipped[name]
        figures |= more | {
            "run/steps_per_second": steps / elapsed,
            "run/data_wait": waited / elapsed,
            "run/bad_steps": progress.bad_steps,
            "run/epoch": progress.epoch,
        }
        self.accelerator.log(figures, step=progress.step)
        line = f"{self._losses(figures)}, {remark}".removesuffix(", ")
        return f"{line}, {waited / elapsed:.0%} of the time waiting for data"

    def _losses(self, figures: dict[str, float]) -> str:
        """Return "loss 0.531"; for a plain log "loss 0.531 (reconstruction 0.21), discriminator 1.9 (...)"."""
        if not self.plain_log:
            return f"loss {figures.get(self.recipe.loss_figure, float('nan')):.3f}"
        model, total = self.recipe.loss_figure.split("/")
        parts = []
        for module in self.recipe.modules:
            terms = {
                name.removeprefix(f"{module}/"): value
                for name, value in figures.items()
                if name.startswith(f"{module}/")
            }
            if not terms and module != model:
                continue
            loss = f"{terms.pop(total, float('nan')):.4g}"
            rest = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            name = "loss" if module == model else module
            parts.append(f"{name} {loss}" + (f" ({rest})" if rest else ""))
        return ", ".join([*parts, f"learning rate {figures['run/learning_rate']:.3g}"])
