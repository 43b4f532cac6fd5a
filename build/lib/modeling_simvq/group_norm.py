"""GroupNorm over whole images, or at every position by itself."""

import torch
from torch import Tensor, nn


class ImageNorm(nn.GroupNorm):
    """GroupNorm. It accepts one value per group, as an image of one token may give.

    Args:
        channels: C, a multiple of groups.
        groups: statistics are those of C / groups channels.
        per_position: take them at every position by itself, not over the whole image: then nothing in the
            network is global, and what a region gives does not depend on what else is in the picture.
    """

    def __init__(self, channels: int, groups: int, per_position: bool = False):
        super().__init__(groups, channels, eps=1e-6)
        self.per_position = per_position

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if not self.per_position:
            # nn.GroupNorm refuses groups of one value, in evaluation too.
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        groups = hidden.float().unflatten(1, (self.num_groups, -1))
        centred = groups - groups.mean(dim=2, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(dim=2, keepdim=True) + self.eps)
        normed = (centred * scale).flatten(1, 2)
        normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(hidden.dtype)
