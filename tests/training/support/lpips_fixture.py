"""The fixtures' LPIPS: a VGG of a sixteenth of the width, with weights of the original's names."""

import warnings
from pathlib import Path

import lpips
import torch
from torch import nn

from tests.fixtures.recipe import value  # noqa: F401  (re-exported)

FIXTURES = Path(__file__).parents[2] / "fixtures"


def narrow_lpips(state: dict[str, torch.Tensor]) -> nn.Module:
    """The lpips package's network, narrowed and filled with `net.slice*` and `lin*` weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by arguments of long ago
        network = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    for module in network.net.children():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                inputs = layer.in_channels if layer.in_channels == 3 else layer.in_channels // 16
                setattr(module, name, nn.Conv2d(inputs, layer.out_channels // 16, 3, padding=1))
    for index in range(5):
        lin = getattr(network, f"lin{index}")
        lin.model[-1] = nn.Conv2d(lin.model[-1].in_channels // 16, 1, 1, bias=False)
    own = dict(state)
    own |= {f"lins.{n[3]}{n[4:]}": t for n, t in state.items() if n.startswith("lin")}
    missing, unexpected = network.load_state_dict(own, strict=False)
    assert not unexpected
    assert all("scaling_layer" in name for name in missing), missing
    return network.eval().requires_grad_(False)
