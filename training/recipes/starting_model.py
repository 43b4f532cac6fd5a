"""Runs that begin from a model that there is: a folder, or a name on the Hub."""

import copy
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hub_cards.tokenizer_card import is_hub_id
from modeling_simvq import SimVQ
from training.losses.discriminator_files import load_discriminator
from training.runtime.settings import SettingsError, one_of, setting

logger = get_logger(__name__)

PARTS = ("all", "encoder", "quantizer", "decoder")
# Settings that a run may change without another shape of the weights; codebook_size may grow.
FREE = ("codebook_size", "commitment_cost", "dropout", "attention_dropout", "quantizer_dropout")


@dataclass(frozen=True)
class Recorded:
    """Record of a run that goes on: the configuration of its model, and its settings."""

    config: dict
    settings: dict


class GoesOn:
    """Settings with init_from, which a run that goes on does not need any more."""

    recorded: Recorded | None = None

    def go_on_from(self, recorded: Recorded) -> None:
        """Take the sizes from the run that goes on."""
        self.recorded = recorded


@dataclass
class StartSettings(GoesOn):
    """Settings of tokenizers that begin from another one."""

    init_from: str | None = setting(
        None, "begin from this tokenizer, a folder or a name on the Hub; its sizes are taken"
    )
    train: str = setting(
        "all",
        "all, or only the encoder, quantizer or decoder: with decoder the codes stay as they are",
    )

    def check_start(self, *not_with: str) -> None:
        """Check these settings.

        Args:
            not_with: settings that would undo what the model brings.

        Raises:
            SettingsError: naming the setting.
        """
        one_of(self, "train", PARTS)
        if self.init_from is None:
            if self.train != "all":
                raise SettingsError(
                    f"train={self.train} leaves the rest as it is, which makes sense only for a model that "
                    "there is: set init_from"
                )
            return
        for name in not_with:
            if getattr(self, name):
                raise SettingsError(
                    f"{name}: the tokenizer of init_from has been trained: leave {name} out"
                )

    def frozen_parts(self, model: PreTrainedModel) -> list[nn.Module]:
        """Return the modules that `train` leaves as they are."""
        parts = {
            "encoder": [model.encoder, model.whitening],
            "quantizer": [model.quantizer],
            "decoder": [model.decoder],
        }
        if self.train == "all":
            return []
        others = [modules for part, modules in parts.items() if part != self.train]
        return [module for modules in others for module in modules if module is not None]

    def go_on_with(
        self, discriminator: nn.Module, sizes: dict[str, int], weight: float | None
    ) -> None:
        """Give the discriminator the weights of the one beside init_from, if both are there and it has a say.

        Args:
            sizes: what it was built with.
            weight: of the adversarial loss.
        """
        if self.init_from is not None and self.recorded is None and weight != 0:
            load_discriminator(discriminator, sizes, self.init_from)


def load_source(
    model_class: type[PreTrainedModel], name: str, recorded: Recorded | None = None
) -> PreTrainedModel:
    """Load the model that a run begins from, in float32.

    Args:
        recorded: of a run that goes on: the model then has its sizes, and its weights are still to come.

    Raises:
        SettingsError: if there is none, or it is of another kind.
    """
    if recorded is not None:
        return model_class(model_class.config_class.from_dict(recorded.config))
    wanted, path = model_class.config_class.model_type, Path(name)
    if path.is_file():
        raise SettingsError(f"init_from: {name} is a file: name the folder that holds it")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SettingsError(f"init_from: the folder {name} holds no model: it has no config.json")
    if not path.exists() and not is_hub_id(name):
        raise SettingsError(f"init_from: there is no folder {name}")
    try:
        found = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if found != wanted:
            raise SettingsError(
                f"init_from: {name} is of type {found}, this command trains {wanted}"
            )
        # Without pickle, whoever made the file.
        return model_class.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, SettingsError):
            raise
        reason = " ".join(str(error).split())
        raise SettingsError(f"init_from: cannot load {name}: {reason}") from error


def begin_from(source: PreTrainedModel, settings: StartSettings, **more) -> PreTrainedModel:
    """Return a model with the source's weights, to the bit, in which some settings may differ.

    Settings that nobody has chosen become the source's. A codebook that grows keeps its codes and its W, and
    its new rows are drawn with the mean and the covariance of the old ones.

    Args:
        more: fields of the configuration that are no settings of the model.

    Raises:
        SettingsError: if a setting was chosen that gives the weights another shape.
    """
    adopt_sizes(settings, source.config)
    names = [spec.name for spec in fields(settings) if spec.name in FREE]
    config = copy.deepcopy(source.config)
    for name, value in ({name: getattr(settings, name) for name in names} | more).items():
        if (before := getattr(config, name)) != value:
            logger.info(f"init_from: {name} {before} -> {value}")
            setattr(config, name, value)
    weights = source.state_dict()
    if config.codebook_size != source.config.codebook_size:
        if getattr(settings, "train", "all") in ("decoder", "encoder"):
            raise SettingsError(
                f"train={settings.train} leaves the codes as they are, but with more of them many would be "
                "nearer: grow the codebook with train=all or train=quantizer, or leave codebook_size out"
            )
        weights["quantizer.basis"] = _grown(source, config.codebook_size)
    model = type(source)(config)
    model.load_state_dict(weights)
    return model


def is_chosen(settings, name: str) -> bool:
    """Tell whether somebody has chosen a setting, as against left it at its default."""
    return name in getattr(settings, "given", ())


def adopt_sizes(settings, source: PreTrainedConfig) -> None:
    """Set the settings that nobody has chosen to what the source has.

    Args:
        settings: with `init_from`, and fields by the names of the configuration.

    Raises:
        SettingsError: naming each that was chosen otherwise and shapes the weights.
    """
    wrong = []
    for name in (spec.name for spec in fields(settings) if hasattr(source, spec.name)):
        ours, theirs = getattr(settings, name), getattr(source, name)
        if not is_chosen(settings, name):
            setattr(settings, name, theirs)
        elif ours != theirs and name not in FREE:
            wrong.append(f"{name} is {ours} and the model's is {theirs}")
    if wrong:
        raise SettingsError(
            f"init_from: {settings.init_from} has other sizes: {'; '.join(wrong)}: leave them out, or train a "
            "new model without init_from"
        )


def _grown(source: PreTrainedModel, size: int) -> Tensor:
    """Return C with as many rows as are wanted."""
    quantizer, had = source.quantizer, source.config.codebook_size
    if size < had:
        raise SettingsError(
            f"codebook_size: the model of init_from has {had} codes and cannot lose any: set {had} or more"
        )
    if source.config.quantizer != "simvq" or not isinstance(quantizer, SimVQ):
        raise SettingsError(
            "codebook_size: only the C of one simvq can grow, and this model has "
            f"{source.config.num_quantizers} x {source.config.quantizer} of {had} codes: leave it out"
        )
    rows = quantizer.basis.detach().double()
    mean, width = rows.mean(dim=0), rows.shape[1]
    if had > 4 * width:
        centred = rows - mean
        covariance = centred.T @ centred / had
    else:  # too few rows to tell a covariance from
        covariance = torch.eye(width, dtype=rows.dtype) * rows.var()
    covariance.diagonal().add_(1e-9 * covariance.diagonal().mean())
    factor = torch.linalg.cholesky(covariance)
    more = torch.randn(size - had, width, dtype=rows.dtype) @ factor.T + mean
    return torch.cat([quantizer.basis.detach(), more.to(quantizer.basis.dtype)])
