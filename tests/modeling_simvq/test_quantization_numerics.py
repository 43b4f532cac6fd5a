"""Arithmetic and memory of the quantizer: what half precision, large values and gradients must not do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_simvq import SimVQ


def test_a_code_is_its_own_nearest_code():
    torch.manual_seed(0)
    quantizer = SimVQ(2000, 16).eval()
    codes = torch.arange(2000).view(2, 1000)
    _, found, loss = quantizer(quantizer.lookup(codes))
    assert torch.equal(found, codes) and loss == 0


def test_duplicated_codes_give_the_lowest_index():
    quantizer = SimVQ(40, 4).eval()
    with torch.no_grad():
        quantizer.basis[20:] = quantizer.basis[:20]
    _, codes, _ = quantizer(torch.randn(3, 4, 50))
    assert codes.max() < 20


def test_half_precision_model_and_latents_use_float32_arithmetic():
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        quantizer = SimVQ(256, 8).eval()
        quantizer.codebook()
        quantizer.to(dtype)
        latents = torch.randn(2, 8, 6, 6).to(dtype)
        quantized, codes, loss = quantizer(latents)
        reference = SimVQ(256, 8).eval()
        reference.load_state_dict({k: v.float() for k, v in quantizer.state_dict().items()})
        expected, expected_codes, expected_loss = reference(latents.float())
        assert torch.equal(codes, expected_codes) and torch.equal(loss, expected_loss)
        assert torch.equal(quantized, expected.to(dtype))


def test_straight_through_passes_the_gradient_unchanged():
    quantizer = SimVQ(64, 8)
    latents = torch.randn(2, 8, 5, requires_grad=True)
    upstream = torch.randn(2, 8, 5)
    quantizer(latents)[0].backward(upstream)
    assert torch.equal(latents.grad, upstream)
    assert quantizer.projection.weight.grad is None  # only the loss trains W


class SeenShapes(TorchDispatchMode):
    """Collects the shapes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [2, 16])  # copied as a batch, and image by image
def test_the_gradient_has_the_layout_of_the_latents(layout, side):
    """Otherwise whatever made the latents copies it first."""
    torch.manual_seed(0)
    module = SimVQ(100, 32)
    latents = torch.randn(3, 32, side, side).to(memory_format=layout).requires_grad_()
    quantized, codes, loss = module(latents)
    assert quantized.is_contiguous()
    torch.testing.assert_close(quantized, module.lookup(codes))
    (gradient,) = torch.autograd.grad(quantized.sum() + loss, latents)
    assert gradient.is_contiguous(memory_format=layout)
    expected = 1 + 0.25 * 2 * (latents - quantized) / latents.numel()
    torch.testing.assert_close(gradient, expected)


def test_no_dense_gradient_of_the_codebook_is_ever_made():
    quantizer = SimVQ(977, 8)
    latents = torch.randn(2, 8, 5, requires_grad=True)
    quantized, _, loss = quantizer(latents)
    with SeenShapes() as backward:
        (quantized.sum() + loss).backward()
    assert latents.grad is not None and quantizer.projection.weight.grad is not None
    assert not [shape for shape in backward.shapes if 977 in shape]


def test_codebook_kept_in_inference_mode_serves_autograd_later():
    quantizer = SimVQ(64, 8).eval()
    with torch.inference_mode():
        kept = quantizer._book().codes
        assert quantizer._book().codes.data_ptr() == kept.data_ptr()
    latents = torch.randn(1, 8, 4, requires_grad=True)
    quantized, _, loss = quantizer(latents)
    (quantized.sum() + loss).backward()
    assert latents.grad is not None


def test_optimiser_step_in_evaluation_mode_is_seen_by_decoding():
    quantizer = SimVQ(64, 8).eval()
    codes = torch.arange(64).view(1, 64)
    with torch.no_grad():
        before = quantizer.lookup(codes)
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        step = optimizer([p for p in quantizer.parameters() if p.requires_grad], lr=0.1)
        step.zero_grad()
        quantizer(torch.randn(1, 8, 9))[2].backward()
        step.step()
        with torch.no_grad():
            after = quantizer.lookup(codes)
        assert (after != before).any(dim=1).all()
        before = after


def test_any_number_of_spatial_dimensions():
    quantizer = SimVQ(16, 4).eval()
    for spatial in ((), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)):
        quantized, codes, _ = quantizer(torch.randn(2, 4, *spatial))
        assert quantized.shape == (2, 4, *spatial) and codes.shape == (2, *spatial)
        assert torch.equal(quantizer.lookup(codes), quantized)
