"""The two factors of SimVQ's codebook, the basis C and the projection W: checked, made and multiplied."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .float32_module import Float32Linear
from .float32_product import linear

BASIS_INITS = ("normal", "uniform", "orthogonal")


def check_options(
    codebook_size: int,
    codebook_dim: int,
    basis_dim: int,
    basis_init: str | Tensor,
    projection_hidden_dim: int | None,
    train_projection: bool,
) -> None:
    """Raise ValueError if a size or an option of SimVQ is impossible, naming it."""
    sizes = {
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "basis_dim": basis_dim,
        "projection_hidden_dim": 1 if projection_hidden_dim is None else projection_hidden_dim,
    }
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise ValueError(f"sizes of SimVQ must be at least 1, got {', '.join(wrong)}")
    if isinstance(basis_init, Tensor):
        if basis_init.shape != (codebook_size, basis_dim):
            raise ValueError(
                f"basis_init must have shape {(codebook_size, basis_dim)}, got {tuple(basis_init.shape)}"
            )
    elif basis_init not in BASIS_INITS:
        raise ValueError(f"basis_init must be a tensor or one of {BASIS_INITS}, got {basis_init!r}")
    if not train_projection and (basis_dim != codebook_dim or projection_hidden_dim is not None):
        raise ValueError(
            "train_projection=False leaves W out: basis_dim must be codebook_dim, and "
            "projection_hidden_dim unset"
        )


def check_switches(**switches: bool) -> None:
    """Raise ValueError if a value is no bool: the word false, as from a file, would count as true."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")


def fill_basis(basis: Tensor, basis_init: str | Tensor) -> None:
    """Fill C, (K, m), in place: drawn in one of the ways of BASIS_INITS, or copied from a tensor.

    Any other name, such as that of a basis that was given, leaves it as it is.
    """
    size, width = basis.shape
    if isinstance(basis_init, Tensor):
        init.copy_(basis, basis_init)
    elif basis_init == "normal":
        init.normal_(basis, mean=0.0, std=width**-0.5)
    elif basis_init == "uniform":
        init.uniform_(basis, -((3 / width) ** 0.5), (3 / width) ** 0.5)
    elif basis_init == "orthogonal":
        blocks = basis.new_empty(-(-size // width), width, width, dtype=torch.float32)
        rotations = torch.linalg.qr(blocks.normal_()).Q.flatten(0, 1)
        init.copy_(basis, rotations[:size])


def make_projection(basis_dim: int, codebook_dim: int, hidden_dim: int | None = None) -> nn.Module:
    """Return W and b, one linear layer; with `hidden_dim`, two with GELU in between."""
    if hidden_dim is None:
        return Float32Linear(basis_dim, codebook_dim)
    return nn.Sequential(
        Float32Linear(basis_dim, hidden_dim), nn.GELU(), Float32Linear(hidden_dim, codebook_dim)
    )


def project(rows: Tensor, projection: nn.Module) -> Tensor:
    """Return the codes (..., d) float32 of rows (..., m) of the basis."""
    rows = rows.float()
    with torch.autocast(device_type=rows.device.type, enabled=False):
        for layer in layers_of(projection):
            if is_plain(layer) and isinstance(layer, nn.Linear):
                bias = None if layer.bias is None else layer.bias.float()
                rows = linear(rows, layer.weight.float(), bias)
            else:
                rows = layer(rows)
    return rows.float()


def layers_of(projection: nn.Module) -> list[nn.Module]:
    """Return the layers of a projection that run one after another."""
    whole = type(projection) is nn.Sequential and not has_hooks(projection)
    return list(projection) if whole else [projection]


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer does what its class in torch does, and with nothing but its weight and bias."""
    if "forward" in layer.__dict__ or has_hooks(layer):
        return False
    if type(layer).forward is nn.Linear.forward:
        return type(layer.weight) in (Tensor, nn.Parameter)
    return type(layer).forward in (nn.GELU.forward, nn.Identity.forward)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something else runs when the module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
