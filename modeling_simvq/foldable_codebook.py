"""Folding of a model's codebook, the same for every model that holds a quantizer."""

import copy


class FoldableCodebook:
    """Mixin of models with a `quantizer` and a `config` that says how to make it."""

    def fold_codebook(self) -> None:
        """Make the effective codebook the stored one, for export: W becomes the identity. Codes stay.

        Raises:
            ValueError: if the quantizer is another than simvq.
        """
        if self.config.quantizer != "simvq":
            raise ValueError(
                f"fold_codebook: only quantizer='simvq' has a W to fold, this one is {self.config.quantizer!r}"
            )
        self.quantizer.fold_codebook()
        self.config = copy.deepcopy(self.config)  # other models may have been made with it
        self.config.quantizer_options, self.config.share_basis = {}, False
