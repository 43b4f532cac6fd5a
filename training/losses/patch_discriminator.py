"""PatchGAN discriminator: judges overlapping patches of an image as real or reconstructed."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4 with batch norm and LeakyReLU (Isola et al. 2017; fixture losses_image).

    Args:
        in_channels: channels of the images.
        base_channels: width of the first layer; it doubles per layer up to eight times.
        num_layers: layers of stride 2; the published model has 3 and 2,765,633 parameters.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, base_channels, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = base_channels
        for depth in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**depth, 8)
            stride = 2 if depth < num_layers else 1
            layers += [
                # Batch norm has a bias of its own.
                nn.Conv2d(previous, width, kernel_size=4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, kernel_size=4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, H, W), 24 pixels or more a side, to a logit per patch (B, 1, h, w)."""
        return self.main(pixel_values)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
