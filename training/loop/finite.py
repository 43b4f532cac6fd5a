"""Values that are not finite: noticed at the step, kept out of everything that lasts, and diagnosed.

A step whose loss or gradients are not finite is skipped by all ranks. Skipping cures a bad batch; it cannot
cure weights that are bad already, and then the run stops at once.
"""

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn

from hub_cards.user_error import UserError
from training.runtime.sharding import own_part
from training.runtime.step_window import StepWindow

logger = get_logger(__name__)

# A gradient scaler below this cannot save half precision any more: the gradients themselves are at fault.
LOWEST_SCALE = 1.0


class DivergedError(UserError):
    """Training met non-finite values and cannot continue. The message names the term and the layer."""


def first_non_finite(tree, name: str = "") -> str | None:
    """Name of the first tensor in nested dicts and lists that holds NaN or infinity; None if all is well."""
    if isinstance(tree, Tensor):
        tree = own_part(tree)
        sound = not tree.is_floating_point() or bool(tree.isfinite().all())
        return None if sound else name
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return None
    for key, value in items:
        found = first_non_finite(value, f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


class BufferKeeper:
    """Takes running statistics back to where they stood before a bad batch passed through them.

    Ranks have their own statistics, of their own batches: a checkpoint holds those of each.

    Args:
        modules: whose buffers are kept: batch norm's means, LeCAM's and the like.
    """

    def __init__(self, modules: list[nn.Module]):
        found = {
            id(buffer): (f"{number}.{name}", buffer)
            for number, module in enumerate(modules)
            for name, buffer in module.named_buffers()
        }
        self._names = [name for name, _ in found.values()]
        self._buffers = [buffer for _, buffer in found.values()]
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers as they are now."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to what they were."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)

    def state_dict(self) -> dict:
        return {"buffers": self._buffers, "names": self._names}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Load what is there: a loss with another perceptual network has other constants."""
        # Earlier versions kept no names; a perceptual network's buffers are the last.
        names = state.get("names", self._names)
        saved = dict(zip(names, state["buffers"], strict=False))
        for name, buffer in zip(self._names, self._buffers, strict=True):
            if name in saved and saved[name].shape == buffer.shape:
                buffer.copy_(saved[name])


class LayerWatch:
    """Finds the first layer whose output is not finite. It waits for the device at every layer."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.first: str | None = None
        self._hooks = [
            layer.register_forward_hook(self._hook(f"{name}.{path}".rstrip(".")))
            for name, module in modules.items()
            for path, layer in module.named_modules()
        ]

    def _hook(self, name: str):
        def look(layer: nn.Module, args: tuple, output) -> None:
            # Hooks run when a layer returns: those of the layers inside it have run by then.
            if self.first is None and first_non_finite(output) is not None:
                self.first = name

        return look

    def remove(self) -> None:
        """Let the layers run freely again."""
        for hook in self._hooks:
            hook.remove()


class NonFiniteGuard:
    """Counts bad steps, stops the run with a diagnosis when there are too many in a row.

    After a bad step every layer is watched until a step is good, so that the diagnosis can name one.

    Args:
        limit: bad steps in a row that end the run.
        modules: what is trained, by name, without wrappers.
        others: modules that take part in the losses.
    """

    def __init__(
        self,
        limit: int,
        accelerator: Accelerator,
        modules: dict[str, nn.Module],
        others: list[nn.Module],
    ):
        self.limit, self.accelerator, self.modules = limit, accelerator, modules
        self._watched = modules | {type(other).__name__: other for other in others}
        self.in_a_row = 0
        self.overflows = 0  # steps with one of fp16, which the scaler met with a lower scale
        self._overflow = False  # in the step under way
        self._last_bad_step: int | None = None
        # Which inputs of each batch, and which losses, are finite.
        self._inputs: StepWindow[dict[str, Tensor]] = StepWindow()
        self._losses: StepWindow[Tensor] = StepWindow()
        self._watch: LayerWatch | None = None

    def state_dict(self) -> dict:
        return {
            "in_a_row": self.in_a_row,
            "overflows": self.overflows,
            "last_bad_step": self._last_bad_step,
        }

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row, self.overflows = state["in_a_row"], state["overflows"]
        self._last_bad_step = state["last_bad_step"]

    def note_batch(self, batch: dict[str, Tensor]) -> None:
        """Remember which inputs are finite; nothing waits for the device."""
        floating = {k: v for k, v in batch.items() if torch.is_floating_point(v)}
        self._inputs.note({name: values.isfinite().all() for name, values in floating.items()})

    def poison(self, loss: Tensor) -> Tensor:
        """The loss, whose gradients are all NaN if it is not finite.

        DistributedDataParallel averages the gradients, so that every rank then has NaN and skips the step,
        although the loss of one rank alone was bad. Finite losses are multiplied by exactly one.
        """
        loss_value = loss.detach()
        self._losses.note(loss_value.isfinite().all())
        return loss * (1 + 0 * loss_value)

    def settle(self, skipped: bool) -> None:
        """End a step, of all modules and with all its batches."""
        self._inputs.settle(skipped)
        self._losses.settle(skipped)
        self.overflows += self._overflow
        self._overflow = False
        if not skipped:
            self.in_a_row = 0
            if self._watch is not None:
                self._watch.remove()
                self._watch = None

    def overflowed(self, gradients: list[Tensor]) -> bool:
        """Tell whether non-finite gradients are only fp16's overflow. All ranks call it then."""
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < LOWEST_SCALE:
            return False
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            return False  # numbers that float32 cannot square: no scale is to blame
        only_gradients = all(gather_object([all(bool(finite) for finite in self._losses)]))
        self._overflow |= only_gradients
        return only_gradients

    def bad(self, figures: dict[str, Tensor], module: nn.Module, step: int) -> None:
        """The update of `module` was skipped; a step counts once, whichever module was bad. For all ranks.

        Raises:
            DivergedError: after too many in a row, or if weights are not finite, which skipping cannot cure.
        """
        self.in_a_row += step != self._last_bad_step
        self._last_bad_step = step
        cause = self._cause(figures, module)
        logger.warning(f"step {step} skipped, its values are not finite ({cause})")
        # Buffers may well hold what this batch left there; they are set back.
        weights = self._agree({n: dict(m.named_parameters()) for n, m in self.modules.items()})
        if weights is not None:
            raise DivergedError(
                f"step {step}: the weights {weights} are not finite, and skipping steps cannot cure that "
                f"({cause})"
            )
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were not finite ({cause}). Try warmup_steps, max_grad_norm=1, "
                "a lower learning_rate or mixed_precision=bf16"
            )
        if self._watch is None:
            self._watch = LayerWatch(self._watched)

    def check(self, states: dict) -> None:
        """Refuse to continue with states, by name, that hold NaN or infinity. For all ranks.

        Raises:
            DivergedError: naming the tensor.
        """
        found = self._agree(states)
        if found is not None:
            raise DivergedError(f"{found} is not finite: no checkpoint is written")

    def _agree(self, states: dict) -> str | None:
        found = [name for name in gather_object([first_non_finite(states)]) if name is not None]
        return found[0] if found else None

    def _cause(self, figures: dict[str, Tensor], module: nn.Module) -> str:
        """Terms and layer, of all ranks."""
        gradients = [
            name
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and not own_part(parameter.grad).isfinite().all()
        ]
        own = {
            "inputs": sorted({k for flags in self._inputs for k, v in flags.items() if not v}),
            "terms": [name for name, value in figures.items() if not value.isfinite().all()],
            "output": None if self._watch is None else self._watch.first,
            # Backward passes run from the last layer to the first: the last bad one was the first to be so.
            "gradient": gradients[-1] if gradients else None,
            "loss": all(map(bool, self._losses)),
        }
        found = gather_object([own])
        if not all(rank["loss"] for rank in found):  # which made all gradients NaN
            for rank in found:
                rank["gradient"] = None
        parts = []
        for key, text in (("inputs", "the batch itself"), ("terms", "terms")):
            names = {name: None for rank in found for name in rank[key]}
            if not names:
                continue
            ranks = [str(number) for number, rank in enumerate(found) if rank[key]]
            where = f" on rank {', '.join(ranks)}" if len(ranks) < len(found) else ""
            parts.append(f"{text}: {', '.join(names)}{where}")
        if not any(rank["terms"] for rank in found):
            parts.append("terms: all finite")
        for key, text in (("output", "such an output"), ("gradient", "such a gradient")):
            names = [rank[key] for rank in found if rank[key]]
            if names:
                parts.append(f"first layer with {text}: {names[0]}")
        return "; ".join(parts)
