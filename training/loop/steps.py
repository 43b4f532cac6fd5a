"""One step of a recipe's modules."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.loop.finite import NonFiniteGuard
from training.loop.settings import LoopSettings
from training.runtime import sharding
from training.runtime.step_window import StepWindow
from training.runtime.unwrapped import unwrapped


@dataclass
class StepResult:
    """Result of a forward and backward pass.

    Attributes:
        figures: detached scalars.
        skipped: 1 if the step was not taken.
        weights: how much figures that are means over the batch count beside those of other batches, by name;
            all others count 1.
    """

    figures: dict[str, Tensor]
    skipped: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


class Stepper:
    """Trains the modules on one batch at a time. Recipes choose a subclass, which has `step`.

    Args:
        recipe: whose class this belongs to.
        modules: what is trained, by name, prepared by Accelerate; the first is the model.
        optimizers: of each, under the same names.
        average: the model with averaged weights.
        total_steps: of the run.
    """

    def __init__(
        self,
        recipe,
        accelerator: Accelerator,
        settings: LoopSettings,
        modules: dict[str, nn.Module],
        optimizers: dict,
        average: nn.Module,
        total_steps: int,
    ):
        self.recipe, self.accelerator, self.settings = recipe, accelerator, settings
        self.modules, self.optimizers, self.average = modules, optimizers, average
        self.total_steps = total_steps
        self.guard = NonFiniteGuard(
            settings.max_bad_steps, accelerator, recipe.modules, recipe.companions
        )
        self.rank_states: dict = {}  # by name, what each rank keeps for itself in a checkpoint
        self._weights: StepWindow[Tensor | None] = (
            StepWindow()
        )  # of batches, if the recipe weighs them

    def note_batch(self, batch: dict[str, Tensor]) -> None:
        """Take note of the next batch of the step under way. The loop calls this before `step`."""
        self.guard.note_batch(batch)
        self._weights.note(self.recipe.batch_weight(batch))

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        """Make forward and backward passes on a batch, and optimiser steps when gradients are due.

        Args:
            step: optimiser steps of the model so far.
        """
        raise NotImplementedError

    def settle(self, skipped: bool) -> None:
        """End a step: keep what its batches told, or forget it if the step was skipped."""
        self.guard.settle(skipped)
        self._weights.settle(skipped)
        if self.accelerator.scaler is not None:
            # Once a step, when no module holds gradients of the old scale any more: AcceleratedOptimizer.step
            # would change the scale after the first of two modules, in the middle of the other's batches.
            self.accelerator.scaler.update()

    def state_dict(self) -> dict:
        """Return what all ranks need to continue from here, beside modules and optimisers."""
        return {"guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.guard.load_state_dict(state["guard"])

    def report(self, step: int) -> tuple[dict[str, float], str]:
        """Return figures since the last report, beside the steps' own, and a word for the progress bar."""
        return {}, ""

    def _backward(self, loss: Tensor) -> None:
        """Make the backward pass; if the loss of one rank is not finite, no rank's gradients will be."""
        *_, weight = self._weights
        if weight is not None:
            loss = loss * weight
        self.accelerator.backward(self.guard.poison(loss))

    def _mean_of_batches(self) -> Tensor | float:
        """Return the factor that makes the gradients those of the weighted mean over all batches of the step.

        Accelerate divides each batch's by gradient_accumulation_steps, although the last step of an epoch may
        have fewer, and ranks are averaged as if they weighed the same. A collective call where batches have
        weights.
        """
        passes = self.accelerator.gradient_accumulation_steps
        weights = list(self._weights)
        if weights[-1] is None:
            return passes / len(weights)
        total = self.accelerator.reduce(torch.stack(weights).sum(), reduction="sum")
        return passes * self.accelerator.num_processes / total

    def _due(self, name: str, module: nn.Module, figures: dict[str, Tensor]) -> "Update":
        """Return the update of a module whose gradients are due; nothing waits for the device."""
        optimizer = self.optimizers[name]
        # Only this optimiser: Accelerate's own clipping would unscale both, and the other one may hold
        # gradients of earlier forward passes that are still scaled.
        self.accelerator.unscale_gradients(optimizer)
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        factor = self._mean_of_batches()
        if not isinstance(factor, float) or factor != 1:
            torch._foreach_mul_([sharding.own_part(g) for g in gradients], factor)
        total = torch.nn.utils.get_total_norm(gradients)
        return Update(name, module, optimizer, figures, gradients, total, sharding.whole(total))

    def _apply(self, updates: list["Update"], step: int) -> int | None:
        """Clip and step. A module whose gradients are not finite is left as it is, and so are those behind it.

        Returns:
            Index of the first of these; None if there is none. One that fp16 overflowed is none.
        """
        # The step's only wait: on all ranks or on none, for they have the same gradients.
        finite = torch.stack([update.norm.isfinite() for update in updates]).tolist()
        for index, (update, is_finite) in enumerate(zip(updates, finite, strict=True)):
            if is_finite:
                self._step(update)
            # The scaler has seen it when they were unscaled, and lowers its scale when the step is over.
            elif not self.guard.overflowed(update.gradients):
                module = unwrapped(self.accelerator, update.module)
                self.guard.bad(update.figures, module, step)
                for left in updates[index:]:
                    left.optimizer.zero_grad(set_to_none=True)
                return index
            update.optimizer.zero_grad(set_to_none=True)
        return None

    def _step(self, update: "Update") -> None:
        most, optimizer = self.settings.max_grad_norm, update.optimizer
        if most is not None:
            parameters = update.module.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, most, update.total)
        # Gradients are unscaled and finite: the scaler has no more say in it.
        (optimizer if self.accelerator.scaler is None else optimizer.optimizer).step()
        update.figures[f"{update.name}/gradient_norm"] = update.norm.detach()


@dataclass
class Update:
    """Optimiser step that is due.

    Attributes:
        figures: of the module; its gradient norm is added when it steps.
        total, norm: of the gradients; of a sharded module this rank's view of it, and the number itself.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    figures: dict[str, Tensor]
    gradients: list[Tensor]
    total: Tensor
    norm: Tensor


class LossStepper(Stepper):
    """One model, whose output holds its loss.

    The recipe has two more methods: `arguments` makes the model's of a batch, and `step_figures` gives figures
    of its output beside the loss, means over the batch as it is.
    """

    def step(self, batch: dict[str, Tensor], step: int) -> StepResult:
        ((name, model),) = self.modules.items()
        output = model(**self.recipe.arguments(batch))
        loss, further = output.loss, self.recipe.step_figures(output)
        figures = {f"{name}/total": loss.detach()} | {f"{name}/{k}": v for k, v in further.items()}
        *_, weight = self._weights
        weights = {} if weight is None else dict.fromkeys(figures, weight)
        self._backward(loss)
        skipped = False
        if self.accelerator.sync_gradients:
            skipped = self._apply([self._due(name, model, figures)], step) is not None
        return StepResult(figures, int(skipped), weights)
