"""SimVQ on the frozen basis of another one: its own are W and b alone."""

from torch import Tensor, nn

from .quantization_simvq import SimVQ


class SimVQOnBasisOf(SimVQ):
    """SimVQ whose C is that of another: never stored, copied or trained twice.

    Args:
        owner: of the basis; both are in one model. The other arguments are those of SimVQ.
    """

    def __init__(self, owner: SimVQ, *args, **options):
        super().__init__(*args, **options)
        del self.basis
        self.__dict__["owner"] = (owner,)  # no submodule: its weights would be named twice

    def __getattr__(self, name: str) -> Tensor:
        # Called only for what is neither attribute nor parameter: a folded codebook is a basis of its own.
        if name == "basis" and "owner" in self.__dict__:
            return self.__dict__["owner"][0].basis
        return super().__getattr__(name)

    def fold_codebook(self) -> None:
        """Put the effective codebook in a basis of its own; W is then the identity and b zero."""
        basis = self.basis.detach().clone()
        del self.__dict__["owner"]
        self.basis = nn.Parameter(basis)
        super().fold_codebook()

    def reset_parameters(self) -> None:
        """Leave C to its owner."""
