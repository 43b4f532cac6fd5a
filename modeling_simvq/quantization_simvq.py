"""SimVQ: vector quantization whose codebook does not collapse (arXiv 2411.02038).

A plain codebook learns only through the codes that are picked, so the others fall behind and die. SimVQ
freezes a random basis C and learns one linear layer over it: code k is ``W c_k + b``. Every step moves W,
and with it every code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .float32_module import Float32Linear, Float32Module, check_float32
from .float32_product import linear
from .integer_codes import integers, outside
from .kept_codebook import KeptCodebook, copies, has_hooks, is_plain, version
from .nearest_code import Book, make_book, nearest_code

# From this size on, torch copies one transposed matrix on the CPU block by block, a batch of them element by
# element.
BLOCKED_COPY = 60 * 60
BASIS_INITS = ("normal", "uniform", "orthogonal")


class SimVQ(Float32Module):
    """Quantizer with a frozen Gaussian basis and one trained linear layer (paper section 4, equations 5-7).

    Loss (means over all elements): ``beta * |z - sg[q]|^2 + |q - sg[z]|^2``; gradients reach the encoder
    straight through. Everything is computed in float32, also under autocast. C, W and b stay in float32 when
    the quantizer, or a model that holds it, is converted to half precision: rounded ones would be other codes.

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
        super().__init__()
        basis_dim = codebook_dim if basis_dim is None else basis_dim
        sizes = {
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "basis_dim": basis_dim,
            "projection_hidden_dim": 1 if projection_hidden_dim is None else projection_hidden_dim,
        }
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"sizes of SimVQ must be at least 1, got {', '.join(wrong)}")
        if isinstance(basis_init, Tensor) and basis_init.shape != (codebook_size, basis_dim):
            raise ValueError(
                f"basis_init must have shape {(codebook_size, basis_dim)}, got {tuple(basis_init.shape)}"
            )
        if not isinstance(basis_init, Tensor) and basis_init not in BASIS_INITS:
            raise ValueError(
                f"basis_init must be a tensor or one of {BASIS_INITS}, got {basis_init!r}"
            )
        if not train_projection and (
            basis_dim != codebook_dim or projection_hidden_dim is not None
        ):
            raise ValueError(
                "train_projection=False leaves W out: basis_dim must be codebook_dim, and "
                "projection_hidden_dim unset"
            )
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.commitment_cost = commitment_cost
        self.basis_init = basis_init if isinstance(basis_init, str) else "given"
        self.train_basis = train_basis
        self.rotation_trick = rotation_trick
        self.basis = nn.Parameter(torch.empty(codebook_size, basis_dim, dtype=torch.float32))
        if not train_projection:
            self.projection = nn.Identity()
        elif projection_hidden_dim is None:
            self.projection = Float32Linear(basis_dim, codebook_dim)
        else:
            self.projection = nn.Sequential(
                Float32Linear(basis_dim, projection_hidden_dim),
                nn.GELU(),
                Float32Linear(projection_hidden_dim, codebook_dim),
            )
        self._kept: KeptCodebook | None = None
        if isinstance(basis_init, Tensor):
            init.copy_(self.basis, basis_init)
        else:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw C anew. A given basis stays. The projection initialises itself, as any nn.Linear does."""
        width = self.basis.shape[1]
        if self.basis_init == "normal":
            init.normal_(self.basis, mean=0.0, std=width**-0.5)
        elif self.basis_init == "uniform":
            init.uniform_(self.basis, -((3 / width) ** 0.5), (3 / width) ** 0.5)
        elif self.basis_init == "orthogonal":
            blocks = self.basis.new_empty(
                -(-self.codebook_size // width), width, width, dtype=torch.float32
            )
            rotations = torch.linalg.qr(blocks.normal_()).Q.flatten(0, 1)
            init.copy_(self.basis, rotations[: self.codebook_size])

    def __setattr__(self, name: str, value) -> None:
        # from_pretrained replaces parameters by new ones that require gradients. All loaders assign
        # through here, so the basis is frozen again at the one place that none of them can skip.
        if name == "basis" and isinstance(value, nn.Parameter):
            value.requires_grad_(self.train_basis)
        super().__setattr__(name, value)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace every latent vector by its nearest code.

        Args:
            latents: (B, d, *spatial), any floating-point type.

        Returns:
            Quantized latents of the same shape and type, codes (B, *spatial) int64, and the commitment
            loss, a float32 scalar. In training, latents that hold NaN or infinity get code 0 and make the
            loss NaN.

        Raises:
            ValueError: if the second dimension is not d; in evaluation, if a latent is not finite.
        """
        if latents.ndim < 2 or latents.shape[1] != self.codebook_dim:
            raise ValueError(
                f"SimVQ takes latents (B, {self.codebook_dim}, *spatial), got {tuple(latents.shape)}"
            )
        with torch.autocast(device_type=latents.device.type, enabled=False):
            exact = latents.float()
            z = _to_rows(exact.detach())
            codes, q = self._quantize(z)
            quantized, commitment_loss = _StraightThrough.apply(exact, z, q, self.commitment_cost)
            if self.rotation_trick:
                quantized = _rotate(exact, quantized.detach())
            if not (self.training or torch.compiler.is_compiling() or commitment_loss.isfinite()):
                raise ValueError(
                    "latents hold NaN, infinity or values too large to square in float32"
                )
        batch, _, *spatial = latents.shape
        return quantized.to(latents.dtype), codes.view(batch, *spatial), commitment_loss

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of z (N, d): their indices (N,) and, with gradient, their vectors (N, d)."""
        if not self._changes():
            book = self._book()  # one for both, whatever another thread does to the weights
            codes = nearest_code(z, book)
            return codes, self._vectors(codes, book)
        if self.codebook_size <= len(z):
            codebook = self._project(self._rows())
            codes = nearest_code(z, codebook.detach())
            return codes, F.embedding(codes, codebook)
        codes = nearest_code(z, self.basis, self._project)
        return codes, self._vectors(codes)

    def _vectors(self, codes: Tensor, book: Book | None = None) -> Tensor:
        """Vectors (..., d) of codes (...), with gradient."""
        if self._changes():
            return self._project(F.embedding(codes, self._rows()))
        vectors = (self._book(codes) if book is None else book).codes[codes]
        if torch.is_grad_enabled():
            # The values of the book: a product of other rows may round in another way.
            moving = self._project(F.embedding(codes, self._rows()))
            if moving.requires_grad:
                vectors = vectors + (moving - moving.detach())
        return vectors

    def _rows(self) -> Tensor:
        # Frozen means frozen, also after someone's model.requires_grad_(True).
        check_float32("basis", self.basis)
        return self.basis if self.train_basis else self.basis.detach()

    def _changes(self) -> bool:
        return self.training or torch.compiler.is_compiling()

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of the given codes, through W and b.

        Args:
            codes: integers of any type in [0, K), (B, *spatial): a tensor, a NumPy array or a list.

        Returns:
            (B, d, *spatial) float32: exactly what forward returned with these codes in evaluation mode.

        Raises:
            ValueError: if the codes are not integers, or one lies outside [0, K).
        """
        codes = integers("codes", codes, self.basis.device)
        if not torch.compiler.is_compiling():
            wrong = outside(codes, self.codebook_size)
            if wrong is not None:
                raise ValueError(
                    f"code {wrong} is out of range: this codebook has {self.codebook_size} codes, "
                    f"0 to {self.codebook_size - 1}"
                )
        with torch.autocast(device_type=codes.device.type, enabled=False):
            return self._vectors(codes).movedim(-1, 1).contiguous()

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The effective codebook ``C W^T + b``, (K, d) float32, without gradient. Do not modify it.

        In evaluation it is computed once and kept, with the norms that the search needs, until W, b or C
        changes in any way: every use compares them, bit by bit, with copies of what they were. Where W is
        something else than the layers of this class (an adapter around them, a hook, a quantized layer),
        nothing is kept.
        """
        return self._project(self._rows()) if self._changes() else self._book().codes

    @torch.no_grad()
    def fold_codebook(self) -> None:
        """Put the effective codebook in the place of C; W is then the identity and b zero. For export.

        Codes, vectors and the state's names stay, whatever the projection was.
        """
        codebook = self._project(self.basis)
        self.basis = nn.Parameter(codebook.to(self.basis.dtype))
        self.projection = Float32Linear(
            self.codebook_dim, self.codebook_dim, device=codebook.device
        )
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def _project(self, rows: Tensor) -> Tensor:
        """Codes (..., d) float32 of rows (..., m) of the basis."""
        rows = rows.float()
        with torch.autocast(device_type=rows.device.type, enabled=False):
            for layer in self._layers():
                if is_plain(layer) and isinstance(layer, nn.Linear):
                    check_float32("projection", layer.weight)
                    bias = None if layer.bias is None else layer.bias.float()
                    rows = linear(rows, layer.weight.float(), bias)
                else:
                    rows = layer(rows)
        return rows.float()

    def _layers(self) -> list[nn.Module]:
        whole = type(self.projection) is nn.Sequential and not has_hooks(self.projection)
        return list(self.projection) if whole else [self.projection]

    def _weights(self) -> tuple[tuple, list[Tensor]]:
        """What the codebook is made from: the kinds of the layers, or () if they are unknown; C, W, b, ..."""
        weights, structure = [self._rows()], []
        for layer in self._layers():
            structure.append((type(layer), getattr(layer, "approximate", None)))
            if not is_plain(layer):
                return (), weights
            if isinstance(layer, nn.Linear):
                # As attributes: that is where parametrizations and functional_call put theirs.
                check_float32("projection", layer.weight)
                weights += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        return tuple(structure), weights

    @torch.no_grad()
    def _book(self, codes: Tensor | None = None) -> Book:
        """The codebook of the present weights. With `codes`, only these need be right."""
        structure, weights = self._weights()
        kept = self._kept
        if kept is not None and kept.made_from(structure, weights, codes):
            return kept.book
        self._kept = kept = None  # the old one goes before the new one is made
        then = copies(weights) if structure else None
        book = make_book(self.basis, self._project)
        if book.half.isneginf().any():
            raise ValueError("the codebook holds NaN or infinity: its training diverged")
        if then is not None:
            kept = KeptCodebook(structure, then, book, version(book.codes))
            # Weights that another thread wrote to meanwhile would stay mixed.
            if kept.made_from(*self._weights()):
                self._kept = kept
        return book

    def train(self, mode: bool = True) -> "SimVQ":
        """Training mode drops the kept codebook: the next step changes it."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "SimVQ":
        self._kept = None  # it does not move along
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        # A copy or a pickle makes its own codebook.
        return {**super().__getstate__(), "_kept": None}

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}=True" for name in ("train_basis", "rotation_trick") if getattr(self, name)
        )
        return (
            f"codebook_size={self.codebook_size}, codebook_dim={self.codebook_dim}, "
            f"commitment_cost={self.commitment_cost}{options}"
        )


class _StraightThrough(torch.autograd.Function):
    """Codes' vectors in the place of the latents, with the latents' gradient; and the commitment loss.

    Two losses and ``z + sg[q - z]`` would pass over the latents eight times and change their layout four
    times. The value is q to the last bit, so that decoding the codes gives the same picture.

    Args:
        latents: (B, d, *spatial). q: the vectors of their codes, (N, d).
        z: the latents as rows, (N, d). Becomes z - q.

    Returns:
        (B, d, *spatial) and ().
    """

    @staticmethod
    def forward(
        ctx, latents: Tensor, z: Tensor, q: Tensor, commitment_cost: float
    ) -> tuple[Tensor, Tensor]:
        quantized = _to_channels_first(q, latents.shape)
        rows = z.sub_(q)
        # The difference in both layouts: another copy costs less time than a change of layout in backward.
        difference = latents - quantized if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(rows, difference)
        ctx.commitment_cost = commitment_cost
        ctx.set_materialize_grads(False)
        mean_square = torch.linalg.vector_norm(rows).square() / max(z.numel(), 1)
        return quantized, (1 + commitment_cost) * mean_square

    @staticmethod
    def backward(ctx, grad_quantized: Tensor | None, grad_loss: Tensor | None) -> tuple:
        if grad_loss is None:
            return grad_quantized, None, None, None
        rows, difference = ctx.saved_tensors
        scale = grad_loss * (2 / max(rows.numel(), 1))
        grad_latents = grad_q = None
        if ctx.needs_input_grad[0]:
            to_encoder = scale * ctx.commitment_cost
            if grad_quantized is None:
                grad_latents = difference * to_encoder
            else:
                # addcmul would be slow with the expanded gradient of a sum.
                grad_latents = (difference * to_encoder).add_(grad_quantized)
        if ctx.needs_input_grad[2]:
            grad_q = rows * -scale
        return grad_latents, None, grad_q, None


def _to_rows(latents: Tensor) -> Tensor:
    """A copy of (B, d, *spatial) as rows (N, d)."""
    batch, width, *spatial = latents.shape
    return _swap(latents.reshape(batch, width, math.prod(spatial))).flatten(0, 1)


def _to_channels_first(rows: Tensor, shape: torch.Size) -> Tensor:
    """A copy of rows (N, d) as (B, d, *spatial).

    Contiguous here and in lookup: convolutions round differently in different memory layouts.
    """
    return _swap(rows.view(shape[0], math.prod(shape[2:]), shape[1])).view(shape)


def _swap(matrices: Tensor) -> Tensor:
    """A contiguous copy of (B, n, m) as (B, m, n), without gradient."""
    batch, height, width = matrices.shape
    swapped = matrices.new_empty(batch, width, height)
    one_by_one = matrices.device.type == "cpu" and height * width >= BLOCKED_COPY
    if one_by_one and not torch.compiler.is_compiling():
        for matrix, copy in zip(matrices, swapped, strict=True):
            copy.copy_(matrix.T)
        return swapped
    return swapped.copy_(matrices.mT)


def _rotate(z: Tensor, q: Tensor) -> Tensor:
    """Values of q with the gradient of the rotation and scaling from z to q (arXiv 2410.06424, section 4.2).

    Args:
        z, q: (B, d, *spatial).
    """
    with torch.no_grad():
        z_length, q_length = (x.norm(dim=1, keepdim=True).clamp(min=1e-6) for x in (z, q))
        z_unit, q_unit = z / z_length, q / q_length
        middle = F.normalize(z_unit + q_unit, dim=1, eps=1e-6)
    along_middle = (z * middle).sum(dim=1, keepdim=True) * middle
    along_z = (z * z_unit).sum(dim=1, keepdim=True) * q_unit
    rotated = (z - 2 * along_middle + 2 * along_z) * (q_length / z_length)
    return q + (rotated - rotated.detach())
