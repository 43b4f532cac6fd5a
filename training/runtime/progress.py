"""Where a run is."""

from accelerate.logging import get_logger

logger = get_logger(__name__)


class Progress:
    """Where a run is: saved with every checkpoint."""

    def __init__(self):
        self.step = 0  # optimiser steps of the model
        self.epoch = 0
        self.batches = 0  # batches taken from the current epoch
        self.bad_steps = 0  # steps skipped because something was not finite
        self.skipped: dict[str, int] = {}  # broken samples, by kind
        self.validated = 0  # step of the last validation
        self.figures: dict[str, float] | None = None  # of the last validation
        self.layout: dict[str, int] = {}  # what the order of the data depends on

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        layout, self.layout = self.layout, {}
        vars(self).update({name: state[name] for name in vars(self)})
        changed = [
            f"{k} {self.layout.get(k)} -> {v}" for k, v in layout.items() if v != self.layout.get(k)
        ]
        if changed:
            logger.warning(
                f"resume: {', '.join(changed)}: the run goes on at the same place in the data, but not with "
                "the very figures that it would have had"
            )
            per_batch, before = (x["batch_size"] * x["processes"] for x in (layout, self.layout))
            self.batches = self.batches * before // per_batch
        self.layout = layout
