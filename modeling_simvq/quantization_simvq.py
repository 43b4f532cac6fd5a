"""SimVQ: vector quantization whose codebook does not collapse (arXiv 2411.02038).

A plain codebook learns only through the codes that are picked, so the others fall behind and die. SimVQ
freezes a random basis C and learns one linear layer over it: code k is ``W c_k + b``. Every step moves W,
and with it every code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .basis_and_projection import (
    check_options,
    check_switches,
    fill_basis,
    make_projection,
    project,
)
from .float32_module import Float32Linear
from .hooked_weights import brings_weights, is_offloaded
from .kept_codebook import KeepsCodebook
from .nearest_code import Book, nearest_code
from .quantizer import Quantizer
from .straight_through import rotate, straight_through, to_rows, with_gradient_of


class SimVQ(KeepsCodebook, Quantizer):
    """Quantizer with a frozen Gaussian basis C and one trained linear layer W (paper section 4, equations 5-7).

    Of latents z, with sg the gradient's stop and mse the mean over all elements::

        codes = nearest(z, W(C))                  # C frozen, W learned
        q     = W(C[codes])
        loss  = beta * mse(z, sg(q)) + mse(q, sg(z))
        out   = z + sg(q - z)

    Everything is computed in float32, also under autocast. C, W and b stay in float32 when the quantizer, or a
    model that holds it, is converted to half precision: rounded ones would be other codes.

    A training step projects min(N, K) rows inside autograd, N the number of latent vectors: the gradient
    of the whole codebook never exists where it would be the larger.

    Args:
        codebook_size: K, number of codes.
        codebook_dim: d, width of a code and of the latents.
        commitment_cost: beta, weight of the encoder's side of the loss.
        basis_dim: m, width of the basis, d unless given.
        basis_init: entries of C. "normal": N(0, 1/m), the paper's; "uniform": of the same variance;
            "orthogonal": rows in blocks of m that are orthogonal, of length one; or a tensor (K, m).
        projection_hidden_dim: width of a hidden layer (with GELU) in between, instead of one linear layer.
        train_basis: train C too.
        train_projection: False leaves W out: the codes are C itself. With train_basis that is plain VQ.
        rotation_trick: gradients reach the encoder through the rotation and scaling that takes z to q
            (arXiv 2410.06424), instead of straight through.

    Attributes:
        basis: C, (K, m), frozen. It is a Parameter and not a buffer because DistributedDataParallel
            broadcasts buffers at every step.
        projection: W and b.

    Raises:
        ValueError: if a size or an option is impossible, naming it.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment_cost: float = 0.25,
        *,
        basis_dim: int | None = None,
        basis_init: str | Tensor = "normal",
        projection_hidden_dim: int | None = None,
        train_basis: bool = False,
        train_projection: bool = True,
        rotation_trick: bool = False,
    ):
        super().__init__(codebook_size, codebook_dim)
        width = codebook_dim if basis_dim is None else basis_dim
        check_switches(
            train_basis=train_basis,
            train_projection=train_projection,
            rotation_trick=rotation_trick,
        )
        check_options(
            codebook_size, codebook_dim, width, basis_init, projection_hidden_dim, train_projection
        )
        self.commitment_cost = commitment_cost
        self.basis_init = basis_init if isinstance(basis_init, str) else "given"
        self.train_basis = train_basis
        self.rotation_trick = rotation_trick
        self.basis = nn.Parameter(torch.empty(codebook_size, width, dtype=torch.float32))
        if train_projection:
            self.projection = make_projection(width, codebook_dim, projection_hidden_dim)
        else:
            self.projection = nn.Identity()
        fill_basis(self.basis, basis_init)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = to_rows(latents)
        codes, q = self._nearest(z)
        out, loss = straight_through(latents, z, q, self.commitment_cost)
        return rotate(latents, out.detach()) if self.rotation_trick else out, codes, loss

    def _nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest codes of z (N, d): their indices (N,) and, with gradient, their vectors (N, d)."""
        if not self._codebook_moves():
            book = self._book()  # one for both, whatever another thread does to the weights
            codes = nearest_code(z, book)
            return codes, self._vectors(codes, book)
        # An exported graph takes any number of latents: it may not depend on how many there are.
        if torch.compiler.is_exporting() or self.codebook_size <= z.shape[0]:
            codebook = self._project(self._rows())
            codes = nearest_code(z, codebook.detach())
            return codes, F.embedding(codes, codebook)
        codes = nearest_code(z, self.basis, self._project)
        return codes, self._vectors(codes)

    def _vectors(self, codes: Tensor, book: Book | None = None) -> Tensor:
        """Return the vectors (..., d) of codes (...), W(C[codes]), with gradient."""
        if self._codebook_moves():
            return self._project(F.embedding(codes, self._rows()))
        vectors = (self._book(codes) if book is None else book).codes[codes]
        if torch.is_grad_enabled():
            # The values of the book: a product of other rows may round in another way.
            moving = self._project(F.embedding(codes, self._rows()))
            if moving.requires_grad:
                vectors = with_gradient_of(moving, vectors)
        return vectors

    def _project(self, rows: Tensor) -> Tensor:
        return project(rows, self.projection)

    def _rows(self) -> Tensor:
        # Frozen means frozen, also after someone's model.requires_grad_(True).
        return self.basis if self.train_basis else self.basis.detach()

    @brings_weights
    @torch.no_grad()
    def codebook(self) -> Tensor:
        """Return the effective codebook ``C W^T + b``, (K, d) float32, without gradient: a copy.

        In evaluation it is computed once and kept, with the norms that the search needs, until W, b or C
        changes in any way: every use compares them, bit by bit, with copies of what they were. Where W is
        something else than the layers of this class (an adapter around them, a hook, a quantized layer),
        nothing is kept.
        """
        self._check_float32()
        # What is kept never leaves: a caller may write to it in ways that no one sees.
        return (
            self._project(self._rows()) if self._codebook_moves() else self._book().codes
        ).clone()

    @torch.no_grad()
    def fold_codebook(self) -> None:
        """Put the effective codebook in the place of C; W is then the identity and b zero. For export.

        Codes, vectors and the state's names stay, whatever the projection was.

        Raises:
            ValueError: if accelerate keeps the weights elsewhere, or one is not float32.
        """
        if is_offloaded(self):
            raise ValueError(
                "the quantizer's weights are offloaded: fold a model that was loaded without device_map"
            )
        self._check_float32()
        codebook = self._project(self.basis)
        self.basis = nn.Parameter(codebook.to(self.basis.dtype))
        self.projection = Float32Linear(
            self.codebook_dim, self.codebook_dim, device=codebook.device
        )
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def reset_parameters(self) -> None:
        """Draw C again, unless it was given. The projection initialises itself, as any nn.Linear does."""
        fill_basis(self.basis, self.basis_init)

    def __setattr__(self, name: str, value) -> None:
        # from_pretrained replaces parameters by new ones that require gradients. All loaders assign
        # through here, so the basis is frozen again at the one place that none of them can skip.
        if name == "basis" and isinstance(value, nn.Parameter):
            value.requires_grad_(self.train_basis)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        options = [
            f"{name}=True" for name in ("train_basis", "rotation_trick") if getattr(self, name)
        ]
        own = [f"commitment_cost={self.commitment_cost}", *options]
        return ", ".join([super().extra_repr(), *own])
