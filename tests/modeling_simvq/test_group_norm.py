"""Norms of the image tokenizer: over the image, or at every position by itself."""

import pytest
import torch
import torch.nn.functional as F

from modeling_simvq import SimVQImageConfig, SimVQImageModel
from modeling_simvq.group_norm import ImageNorm

SIZES = {"base_channels": 8, "norm_groups": 1, "channel_multipliers": [1, 2], "num_res_blocks": 1}


def _perturbed(norm: ImageNorm) -> ImageNorm:
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def test_one_group_per_position_is_a_layer_norm_over_the_channels():
    norm = _perturbed(ImageNorm(12, 1, per_position=True))
    hidden = torch.randn(2, 12, 3, 5) * 3 + 1
    expected = F.layer_norm(hidden.movedim(1, -1), (12,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(hidden), expected.movedim(-1, 1))


def test_groups_per_position_are_those_of_a_group_norm_of_one_position():
    norm = _perturbed(ImageNorm(12, 3, per_position=True))
    hidden = torch.randn(2, 12, 3, 5)
    positions = hidden.movedim(1, -1).flatten(0, -2)[..., None, None]
    expected = F.group_norm(positions, 3, norm.weight, norm.bias, norm.eps)
    expected = expected[..., 0, 0].unflatten(0, (2, 3, 5)).movedim(-1, 1)
    torch.testing.assert_close(norm(hidden), expected)


@pytest.mark.parametrize("per_position", [True, False])
def test_norm_per_position_keeps_a_region_as_it_is_whatever_else_the_image_shows(per_position):
    torch.manual_seed(0)
    config = SimVQImageConfig(**SIZES, codebook_dim=8, norm_per_position=per_position)
    model = SimVQImageModel(config).eval()
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    other = image.clone()
    other[..., 48:] = 1.0
    with torch.no_grad():
        ours, theirs = model(image), model(other)
    same = torch.equal(ours.latents[..., :8], theirs.latents[..., :8])
    shown = torch.equal(ours.pixel_values[..., :16], theirs.pixel_values[..., :16])
    assert same == shown == per_position


def test_norm_per_position_in_half_precision_computes_its_statistics_in_float32():
    norm = ImageNorm(8, 1, per_position=True).bfloat16()
    hidden = (torch.randn(1, 8, 2, 2) * 1e-2 + 300).bfloat16()
    expected = ImageNorm(8, 1, per_position=True)(hidden.float())
    assert norm(hidden).dtype == torch.bfloat16
    torch.testing.assert_close(norm(hidden).float(), expected, atol=0.02, rtol=0.02)


def test_the_norm_of_one_value_is_refused():
    with pytest.raises(ValueError, match="norm_groups=8 of 8 channels: the norm of one value"):
        SimVQImageConfig(**SIZES | {"norm_groups": 8}, norm_per_position=True)
    assert SimVQImageConfig().norm_per_position is False
