"""One step of a recipe's modules, and the guard against values that are not finite."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from training.settings import LoopSettings

logger = get_logger(__name__)


class DivergedError(RuntimeError):
    """Training met non-finite values again and again. The message names the term and the layer."""


@dataclass
class StepResult:
    """Figures (detached scalars) of a forward and backward pass; skipped: 1 if the step was not taken."""

    figures: dict[str, Tensor]
    skipped: int = 0


class NonFiniteGuard:
    """Counts consecutive bad steps and stops the run with a diagnosis when there are too many."""

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0
        self._last_bad_step: int | None = None

    def good(self) -> None:
        """A step was fine."""
        self.in_a_row = 0

    def bad(self, figures: dict[str, Tensor], module: nn.Module, step: int) -> None:
        """The update of `module` was skipped; a step counts once, whichever of the two was bad."""
        self.in_a_row += step != self._last_bad_step
        self._last_bad_step = step
        terms = [name for name, value in figures.items() if not torch.isfinite(value).all()]
        layer = next(
            (
                name
                for name, parameter in module.named_parameters()
                if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
            ),
            None,
        )
        cause = (
            f"terms: {', '.join(terms) or 'all finite'}; first layer with such a gradient: {layer}"
        )
        logger.warning(
            f"step {step} skipped, its values are not finite ({cause})", main_process_only=False
        )
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were not finite ({cause}). Go on from the last checkpoint "
                "with warmup_steps, max_grad_norm=1, a lower learning_rate or mixed_precision=bf16"
            )


class Stepper:
    """What one batch does to the trained modules. Recipes choose a subclass, which has `step`.

    Args:
        recipe: whose class this belongs to.
        modules: what is trained, by name, prepared by Accelerate; the first is the model.
        optimizers: of each, under the same names.
        average: the model with averaged weights.
    """

    def __init__(
        self,
        recipe,
        accelerator: Accelerator,
        settings: LoopSettings,
        modules: dict[str, nn.Module],
        optimizers: dict,
        average: nn.Module,
    ):
        self.recipe, self.accelerator, self.settings = recipe, accelerator, settings
        self.modules, self.optimizers, self.average = modules, optimizers, average
        self.guard = NonFiniteGuard(settings.max_bad_steps)

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        """Forward and backward passes on a batch; optimiser steps when gradients are due.

        Args:
            step: optimiser steps of the model so far.
        """
        raise NotImplementedError

    def report(self, step: int) -> tuple[dict[str, float], str]:
        """Figures since the last report, beside the means of the steps' own; a word for the progress bar."""
        return {}, ""

    def _update(self, name: str, module: nn.Module, optimizer, figures: dict, step: int) -> bool:
        """Clip and step if gradients are due; True if the step was skipped for not being finite."""
        accelerator = self.accelerator
        if not accelerator.sync_gradients:
            return False
        # Only this optimiser: Accelerate's own clipping would unscale both, and the other one may hold
        # gradients of earlier forward passes that are still scaled.
        accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                module.parameters(), self.settings.max_grad_norm, norm
            )
        # With fp16 the scaler finds overflows by itself, skips the step and lowers its scale: no fault.
        skipped = accelerator.scaler is None and not bool(torch.isfinite(norm))
        if skipped:
            self.guard.bad(figures, accelerator.unwrap_model(module), step)
        else:
            optimizer.step()
            figures[f"{name}/gradient_norm"] = norm.detach()
        optimizer.zero_grad(set_to_none=True)
        return skipped


class LossStepper(Stepper):
    """One model, whose output holds its loss; the recipe's `arguments` makes the model's of a batch."""

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        ((name, model),) = self.modules.items()
        loss = model(**self.recipe.arguments(batch)).loss
        figures = {f"{name}/total": loss.detach()}
        self.accelerator.backward(loss)
        skipped = self._update(name, model, self.optimizers[name], figures, step)
        if self.accelerator.sync_gradients and not skipped:
            self.guard.good()
        return StepResult(figures, int(skipped))
