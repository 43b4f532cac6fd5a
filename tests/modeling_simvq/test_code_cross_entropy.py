"""The chunked cross-entropy is the plain one: value and gradients, in every type."""

import pytest
import torch
import torch.nn.functional as F

from modeling_simvq import code_cross_entropy as module
from modeling_simvq.code_cross_entropy import chunked_cross_entropy


def inputs(dtype=torch.float32, tokens=23, size=37, width=8):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(size, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, size, (tokens,))


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets)


@pytest.mark.parametrize("elements", [1, 37 * 5, 37 * 23, 10**6])
def test_value_and_gradients(elements, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden, weight, targets)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(3 * expected, (hidden, weight)))


def test_double_precision_stays(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 37 * 4)
    hidden, weight, targets = inputs(torch.float64)
    loss = chunked_cross_entropy(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_half_precision(way, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 37 * 5)
    hidden, weight, targets = inputs(torch.bfloat16 if way == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = chunked_cross_entropy(hidden, weight, targets)
        expected = plain(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() < 0.02 * other.float().norm()


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets).detach()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(chunked_cross_entropy(hidden.detach(), weight, targets), loss)


def test_backward_comes_once():
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_the_gradients_of_many_tokens_survive_float16():
    hidden, weight, targets = inputs(tokens=20_000, size=50)
    with torch.autocast("cpu", torch.float16):
        loss = chunked_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad(2**16 * loss, (hidden, weight))
    theirs = torch.autograd.grad(2**16 * plain(hidden, weight, targets), (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
