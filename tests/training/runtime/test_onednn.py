"""Convolutions in half precision on CPUs with AMX."""

import pytest
import torch
import torch.nn.functional as F

import training  # noqa: F401


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_narrow_inputs_give_what_float32_gives(width, stride):
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 2, 65, width), torch.randn(2, 2, 3, 3)
    exact = F.conv2d(inputs, weight, None, stride, 1)
    # What a kernel that reads too far would find.
    freed = [torch.full((size,), 1e35) for size in (100, 1000, 10_000, 100_000) for _ in range(5)]
    del freed
    rounded = F.conv2d(inputs.bfloat16(), weight.bfloat16(), None, stride, 1)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.1)
