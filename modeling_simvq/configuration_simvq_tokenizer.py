"""Fields that the configurations of both tokenizers have: the quantizer."""

import math

from .configuration_checks import (
    CheckedConfig,
    Number,
    at_least,
    at_most,
    codebook_parameters,
    described,
    not_negative,
    probability,
)
from .quantizer_names import ARRANGEMENTS, QUANTIZERS


def known_quantizer(name: str) -> None:
    """Check a field: a name that make_quantizer knows."""
    if name not in QUANTIZERS:
        raise ValueError(f"must be one of {', '.join(QUANTIZERS)}, got {name!r}")


def known_arrangement(name: str) -> None:
    """Check a field: a way to arrange several quantizers."""
    if name not in ARRANGEMENTS:
        raise ValueError(f"must be one of {', '.join(ARRANGEMENTS)}, got {name!r}")


class SimVQTokenizerConfig(CheckedConfig):
    """Base of SimVQImageConfig and SimVQAudioConfig, which add codebook_size, codebook_dim and the networks."""

    commitment_cost: Number = described(
        0.25,
        "beta of the paper's equation 7, weight of the encoder's side of the loss",
        not_negative,
    )
    quantizer: str = described(
        "simvq",
        "simvq, or a system to compare with: vq, vq_ema, fc, fsq, lfq, lc, ibq, diveq, fvq",
        known_quantizer,
    )
    quantizer_options: dict | None = described(
        {},
        "options of the quantizer, such as {rotation_trick: true}; simvq has basis_dim, basis_init, "
        "projection_hidden_dim, train_basis, train_projection and rotation_trick, none set by the paper",
    )
    num_quantizers: int = described(
        1, "Q, codes of a position, each of a codebook of its own", at_least(1), at_most(64)
    )
    quantizer_arrangement: str = described(
        "residual",
        "residual: each quantizer codes what those before it left; grouped: each codes d / Q of the channels",
        known_arrangement,
    )
    share_basis: bool = described(
        False,
        "whether several quantizers have one frozen basis C, each with a linear layer of its own",
    )
    quantizer_dropout: Number = described(
        0.0,
        "share of training batches that use only the first few quantizers, so that these decode well",
        probability,
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

    def validate_quantizers(self) -> None:
        """Refuse settings of several quantizers that do not fit each other.

        Raises:
            ValueError: naming the field.
        """
        if self.share_basis and self.quantizer not in ("simvq", "lc"):
            raise ValueError(f"share_basis: the quantizer {self.quantizer} has no basis to share")
        # The codes of diveq, and the linear layers around the others.
        if self.num_quantizers > 1 and self.quantizer in ("diveq", "fc", "fsq", "lfq"):
            raise ValueError(
                f"num_quantizers = {self.num_quantizers}: {self.quantizer} learns from the decoder's gradient, "
                "which passes several quantizers by: set it to 1, or take another quantizer"
            )

    def quantizer_parameters(self) -> int:
        """About how many numbers the quantizer holds.

        Raises:
            ValueError: naming the field, if one is out of all proportion.
        """
        return self.num_quantizers * codebook_parameters(
            self.codebook_size, self.quantizer_dim, self.quantizer_options
        )

    @property
    def quantizer_dim(self) -> int:
        """Channels that each quantizer codes.

        Raises:
            ValueError: if groups do not divide the channels.
        """
        if self.num_quantizers == 1 or self.quantizer_arrangement == "residual":
            return self.codebook_dim
        if self.codebook_dim % self.num_quantizers:
            raise ValueError(
                f"codebook_dim must be a multiple of num_quantizers = {self.num_quantizers} for grouped "
                f"quantizers, got {self.codebook_dim}"
            )
        return self.codebook_dim // self.num_quantizers

    @property
    def code_bits(self) -> float:
        """Bits of a position: those of all its codes."""
        return self.num_quantizers * math.log2(self.codebook_size)
