"""Settings of the loop, the same for every recipe."""

from dataclasses import dataclass

from training.runtime.settings import SettingsError, at_least, one_of, setting


@dataclass
class LoopSettings:
    """The run: how long, how fast, what is kept. Steps are optimiser steps of the model."""

    output_dir: str = setting(
        "runs/simvq", "folder of checkpoints, images, logs and the final model"
    )
    seed: int = setting(0, "seed of weights, data order and crops")
    batch_size: int = setting(64, "samples per process and forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimiser step")
    mixed_precision: str = setting(
        "no", "no, bf16 or fp16; the code search is float32 in all of them"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower")
    epochs: int = setting(50, "passes over the training set, unless max_steps ends the run before")
    max_steps: int | None = setting(None, "stop after this many steps (needed when streaming)")
    learning_rate: float = setting(1e-4, "peak rate of Adam, of all optimisers")
    adam_betas: list[float] = setting([0.5, 0.9], "Adam's betas, of all optimisers")
    weight_decay: float = setting(0.0, "AdamW's decay of matrices, not of norms and biases")
    lr_schedule: str = setting("constant", "constant or cosine, after the warm-up")
    warmup_steps: int = setting(0, "linear warm-up from 0; helps against NaN")
    min_learning_rate: float = setting(0.0, "floor of the cosine")
    max_grad_norm: float | None = setting(None, "clip the gradients' norm, of each optimiser")
    ema_decay: float = setting(0.999, "average of the weights, which is validated and published")
    log_every: int = setting(50, "steps between two lines of figures")
    validate_every: int = setting(
        1000, "steps between two validations; there is one at the end too"
    )
    save_every: int = setting(1000, "steps between two checkpoints; there is one at the end too")
    keep_checkpoints: int = setting(3, "checkpoints kept, the newest")
    resume: str | None = setting(None, "latest, or the path of a checkpoint")
    tracker: str = setting("tensorboard", "tensorboard, wandb, trackio or none")
    max_bad_steps: int = setting(20, "stop after this many non-finite steps in a row")
    push_to_hub: bool = setting(
        False, "publish the final model on the Hub, with its code and a card"
    )
    hub_model_id: str | None = setting(
        None, "name, or organisation/name, on the Hub; the name of output_dir by default"
    )
    hub_private: bool = setting(False, "publish to a private repository")
    hub_license: str | None = setting(
        None, "licence of the published weights, such as mit; null names none"
    )

    def __post_init__(self):
        one_of(self, "mixed_precision", ("no", "bf16", "fp16"))
        one_of(self, "lr_schedule", ("constant", "cosine"))
        one_of(self, "tracker", ("tensorboard", "wandb", "trackio", "none"))
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "epochs", "log_every")
        at_least(self, 1, "validate_every", "save_every", "keep_checkpoints", "max_bad_steps")
        at_least(self, 0, "warmup_steps", "min_learning_rate", "weight_decay")
        if self.max_steps is not None:
            at_least(self, 1, "max_steps")
        if not 0 < self.learning_rate < 1:
            raise SettingsError(f"learning_rate must lie in (0, 1), got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise SettingsError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise SettingsError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise SettingsError(f"max_grad_norm must be positive or null, got {self.max_grad_norm}")
