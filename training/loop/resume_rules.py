"""Rules for resuming: every changed setting is either applied from there on or refused by name.

A setting that is in neither table fails a test: whoever adds one decides.
"""

from collections.abc import Callable

# Applied from the step at which the run is resumed. Records keep both values and the step.
APPLIED = {
    # The run.
    *("output_dir", "seed", "batch_size", "gradient_accumulation_steps", "mixed_precision"),
    *("gradient_checkpointing", "epochs", "max_steps", "learning_rate", "adam_betas"),
    *("weight_decay", "lr_schedule", "warmup_steps", "min_learning_rate", "max_grad_norm"),
    *("ema_decay", "log_every", "validate_every", "save_every", "keep_checkpoints", "resume"),
    *("tracker", "max_bad_steps", "push_to_hub", "hub_model_id", "hub_private", "hub_license"),
    # The data: the run continues with them at the same place of its epoch.
    *("dataset", "config_name", "revision", "train_split", "validation_split", "streaming"),
    *("shuffle_buffer", "num_workers", "max_train_samples", "max_validation_samples"),
    *("image_column", "resolution", "audio_column", "clip_seconds", "label_column"),
    *("label_dropout", "clip_codes", "tokenizer"),
    # The losses.
    *("reconstruction_weight", "perceptual", "perceptual_weight", "mel_weight", "mel_windows"),
    *("adversarial_weight", "adaptive_scale", "discriminator_start", "lecam_weight"),
    *("commitment_weight", "commitment_cost", "colour_weight", "sync_batch_norm"),
    # What has no weights of its own.
    *("dropout", "attention_dropout", "quantizer_dropout", "decorrelation_weight"),
    *("gram_weight", "drift_weight", "replace_unused_every", "encoder_steps"),
    # Samples that a validation shows.
    *("samples", "sample_classes", "guidance_scale", "temperature", "top_k", "top_p"),
}

_SHAPE = "it shapes the model, whose weights are in the checkpoint"
_JUDGE = "it shapes the discriminator, whose weights are in the checkpoint"
_START = "it only acts at the beginning of a run"


def _autoencoder_steps(old: int, new: int, step: int) -> str | None:
    """The phase may be moved as long as the run is in it."""
    if isinstance(old, int) and step <= min(old, new):
        return None
    return f"the run is at step {step}, beyond one end of the phase or the other"


def _derived(old, new, step: int) -> str | None:
    """Resolve null settings from tokenizer and data; the shapes of the weights tell whether they still fit."""
    return None if old is None or new is None else _SHAPE


# Refused, for the reason given; a function of (old, new, step) gives a reason or None to allow the change.
FIXED: dict[str, str | Callable[..., str | None]] = {
    **dict.fromkeys(("base_channels", "channel_multipliers", "num_res_blocks"), _SHAPE),
    **dict.fromkeys(("codebook_dim", "quantizer", "quantizer_options"), _SHAPE),
    **dict.fromkeys(("num_filters", "downsampling_ratios", "num_residual_layers"), _SHAPE),
    **dict.fromkeys(("num_lstm_layers", "num_decoder_layers", "n_fft"), _SHAPE),
    **dict.fromkeys(
        (
            "norm_groups",
            "norm_per_position",
            "attention",
            "whiten_latents",
            "num_quantizers",
            "quantizer_arrangement",
            "share_basis",
        ),
        _SHAPE,
    ),
    **dict.fromkeys(
        ("streamable", "attention_window"), "the model was trained to see so much of a clip"
    ),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), _SHAPE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _SHAPE),
    **dict.fromkeys(("tie_word_embeddings", "code_factors"), _SHAPE),
    **dict.fromkeys(("codebook_size", "num_classes"), _derived),
    "sampling_rate": "the model is one of audio at this rate",
    **dict.fromkeys(("discriminator_channels", "discriminator_layers"), _JUDGE),
    **dict.fromkeys(("period_channels", "resolution_channels", "dac_channels"), _JUDGE),
    **dict.fromkeys(("codebook_features", "start_from_data", "codes_from_latents"), _START),
    "end_phase_early": _START,
    **dict.fromkeys(("init_from", "train"), _START),
    "autoencoder_steps": _autoencoder_steps,
}

# What a validation's figures depend on, beside the model: across a change of these none is the better one.
VALIDATION = {
    *("dataset", "config_name", "revision", "validation_split", "max_validation_samples"),
    *("image_column", "audio_column", "resolution", "clip_seconds", "clip_codes"),
}

# Not worth a line: every resume has them.
SILENT = ("resume", "output_dir")


def changed_settings(old: dict, new: dict) -> dict[str, tuple]:
    """Settings of both whose values differ, name to (old, new)."""
    return {
        name: (old[name], value)
        for name, value in new.items()
        if name in old and old[name] != value and name not in SILENT
    }


def refusals(changed: dict[str, tuple], step: int) -> list[str]:
    """One sentence for each change that cannot be applied to a run at this step."""
    found = []
    for name, (old, new) in changed.items():
        rule = FIXED.get(name)
        reason = rule(old, new, step) if callable(rule) else rule
        if reason is not None:
            found.append(
                f"{name} was {_shown(old)} and is now {_shown(new)} ({reason}): set {name}={_shown(old)}"
            )
    return found


def describe(changed: dict[str, tuple]) -> str:
    """The changes, for a line of the log."""
    return ", ".join(f"{n} {_shown(old)} -> {_shown(new)}" for n, (old, new) in changed.items())


def _shown(value) -> str:
    return "null" if value is None else str(value)
