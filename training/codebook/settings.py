"""Settings of the quantizer that a tokenizer is trained with."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modeling_simvq.configuration_simvq_tokenizer import SimVQTokenizerConfig
from modeling_simvq.several_quantizers import levels_of
from modeling_simvq.shared_basis import SimVQOnBasisOf
from training.codebook.start import whiten_codes
from training.runtime.settings import SettingsError, setting, settings_of


@dataclass
class QuantizerSettings(
    settings_of(
        SimVQTokenizerConfig,
        *("quantizer", "quantizer_options", "whiten_latents", "num_quantizers"),
        *("quantizer_arrangement", "quantizer_dropout", "share_basis"),
    )
):
    """Settings that the models of both modalities share."""

    codebook_features: str | None = setting(
        None,
        "safetensors file of features (K, m) as frozen basis, of training/external_features.py",
    )

    def options(self, codebook_size: int) -> dict:
        """quantizer_options, with the width of the features."""
        if self.codebook_features is None:
            if self.quantizer == "lc":
                raise SettingsError("codebook_features: the quantizer lc needs a file of features")
            return self.quantizer_options
        if self.quantizer not in ("simvq", "lc"):
            raise SettingsError(
                f"codebook_features: the quantizer {self.quantizer} has no frozen basis"
            )
        found, width = self._features().shape
        if found < codebook_size:
            raise SettingsError(
                f"codebook_features: {self.codebook_features} holds {found} features, "
                f"codebook_size is {codebook_size}"
            )
        return {"basis_dim": width, **self.quantizer_options}

    def fields_of(self, config_class: type[SimVQTokenizerConfig]) -> dict:
        """Return the settings that are fields of a configuration, by name."""
        known = config_class.__dataclass_fields__
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in known}
        return values | {"quantizer_options": self.options(self.codebook_size)}

    def start(self, model: nn.Module) -> None:
        """Put the features in the place of the model's basis, and its codes where whitened latents are.

        Features of another network (quantizer lc) are centred and scaled to the variance of C, 1/m.
        """
        if self.codebook_features is not None:
            self._put_features(model)
        if self.whiten_latents:
            whiten_codes(model.quantizer)

    def _put_features(self, model: nn.Module) -> None:
        features = self._features()[: model.config.codebook_size].float()
        if self.quantizer == "lc":
            features = features - features.mean(dim=0)
            scale = features.square().mean().sqrt().clamp(min=1e-12)
            features = features / (scale * features.shape[1] ** 0.5)
        owners = [q for q in levels_of(model.quantizer) if not isinstance(q, SimVQOnBasisOf)]
        for quantizer in owners:
            quantizer.basis = nn.Parameter(features.clone())
            quantizer.basis_init = "given"

    def _features(self) -> Tensor:
        path = Path(self.codebook_features)
        try:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise SettingsError(f"codebook_features: cannot read {path}: {error}") from error
        if (
            features.ndim != 2
            or not features.is_floating_point()
            or not torch.isfinite(features).all()
        ):
            raise SettingsError(
                f"codebook_features: {path} must hold finite numbers (K, m), got {tuple(features.shape)}"
            )
        return features
