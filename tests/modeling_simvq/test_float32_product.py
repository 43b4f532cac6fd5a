"""Products by two libraries: the same values, gradients, and a choice that a clock makes only where it may."""

import pytest
import torch
import torch.nn.functional as F

from modeling_simvq import float32_product as products


def test_both_products_and_the_choice_between_them():
    rows, codes = torch.randn(704, 33), torch.randn(products.TILE_CODES, 33)
    half, out = torch.randn(len(codes)), torch.empty(704, products.TILE_CODES)
    half[7] = -torch.inf
    ours = products.matmul(rows, codes, half, out)
    torch.testing.assert_close(products.convolution(rows, codes, half), ours)
    product, height = products.fastest_plan(33, torch.get_num_threads())
    assert product in (products.matmul, products.convolution) and height in (2048, 4096)


@pytest.mark.parametrize("shape", [(1024, 24), (16, 4, 4, 24), (1021, 24), (7, 24), (0, 24)])
def test_linear_is_that_of_torch(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(40, 24), torch.randn(40)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    made, expected = products.linear(*ours), F.linear(*theirs)
    torch.testing.assert_close(made, expected)
    pull = torch.randn_like(expected)
    made.backward(pull)
    expected.backward(pull)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-5)


def test_a_projection_does_not_depend_on_a_measurement(monkeypatch):
    monkeypatch.setattr(products, "fastest_plan", lambda *_: pytest.fail("it looked at the clock"))
    products.linear(torch.randn(1 << 12, 8), torch.randn(1 << 11, 8), torch.randn(1 << 11))
