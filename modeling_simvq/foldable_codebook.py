"""Folding of a model's codebook, the same for every model that holds a quantizer."""

import copy

from .several_quantizers import levels_of


class FoldableCodebook:
    """Mixin of models with a `quantizer` and a `config` that says how to make it."""

    def fold_codebook(self) -> None:
        """Make the effective codebook the stored one, for export: W becomes the identity. Codes stay.

        Raises:
            ValueError: if the quantizer has no W: those other than simvq and lc.
        """
        if not all(hasattr(level, "fold_codebook") for level in levels_of(self.quantizer)):
            raise ValueError(
                "fold_codebook: only the quantizers simvq and lc have a W to fold, this one is "
                f"{self.config.quantizer!r}"
            )
        self.quantizer.fold_codebook()
        self.config = copy.deepcopy(self.config)  # other models may have been made with it
        self.config.quantizer_options, self.config.share_basis = {}, False
