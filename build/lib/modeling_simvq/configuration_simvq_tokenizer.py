"""Fields that the configurations of both tokenizers have: the quantizer."""

from .configuration_checks import (
    CheckedConfig,
    Number,
    codebook_parameters,
    described,
    not_negative,
)
from .quantizer_names import QUANTIZERS


def known_quantizer(name: str) -> None:
    """Check a field: a name that make_quantizer knows."""
    if name not in QUANTIZERS:
        raise ValueError(f"must be one of {', '.join(QUANTIZERS)}, got {name!r}")


class SimVQTokenizerConfig(CheckedConfig):
    """Base of SimVQImageConfig and SimVQAudioConfig, which add codebook_size, codebook_dim and the networks."""

    commitment_cost: Number = described(
        0.25,
        "beta of the paper's equation 7, weight of the encoder's side of the loss",
        not_negative,
    )
    quantizer: str = described(
        "simvq",
        "simvq, or a system to compare with: vq, vq_ema, fc, fsq, lfq, lc",
        known_quantizer,
    )
    quantizer_options: dict | None = described(
        {},
        "options of the quantizer, such as {rotation_trick: true}; simvq has basis_dim, basis_init, "
        "projection_hidden_dim, train_basis, train_projection and rotation_trick, none set by the paper",
    )
    whiten_latents: bool = described(
        False,
        "whether latents are whitened before the search, so that none of their directions is too faint for the "
        "codes; not in the paper, and what keeps small models from collapsing",
    )

    def __post_init__(self, **kwargs):
        if self.quantizer_options is None:
            self.quantizer_options = {}
        super().__post_init__(**kwargs)

    def quantizer_parameters(self) -> int:
        """About how many numbers the quantizer holds.

        Raises:
            ValueError: naming the field, if one is out of all proportion.
        """
        return codebook_parameters(self.codebook_size, self.codebook_dim, self.quantizer_options)
