"""Training of several quantizers: where their codes start, and the usage of each."""

import pytest
import torch
from accelerate import Accelerator

from modeling_simvq import SimVQ
from modeling_simvq.several_quantizers import GroupedQuantizer, ResidualQuantizer
from training.codebook.start import match_codes_to_latents, put_codes_on, whiten_codes
from training.codebook.usage import CodeCounter, CodeUsage

WIDTH, SIZE = 6, 256


def residual():
    torch.manual_seed(0)
    return ResidualQuantizer([SimVQ(SIZE, WIDTH) for _ in range(3)]).eval()


def grouped():
    torch.manual_seed(0)
    return GroupedQuantizer([SimVQ(SIZE, WIDTH // 3) for _ in range(3)]).eval()


def latents(count: int, seed: int) -> torch.Tensor:
    """Latents (1, d, count), correlated and away from zero."""
    torch.manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH)
    torch.manual_seed(seed)
    return (torch.randn(count, WIDTH) @ mixing + 5).T[None]


@torch.no_grad()
def left(quantizer, values: torch.Tensor) -> list[float]:
    """Share of the variance that the first quantizers leave."""
    variance = (values - values.mean(dim=2, keepdim=True)).square().mean()
    return [
        float((quantizer(values, count)[0] - values).square().mean() / variance)
        for count in (1, 2, 3)
    ]


@pytest.mark.parametrize("make", [residual, grouped])
def test_codes_start_where_the_latents_are(make):
    """Every residual quantizer fits what those before it leave, and every group its channels."""
    quantizers, held_out = [make(), make()], latents(2000, seed=3)
    match_codes_to_latents(quantizers, latents(4000, seed=2), Accelerator(cpu=True))
    shares = left(quantizers[0], held_out)
    assert shares[0] > 1.5 * shares[1] > 2 * shares[2]
    assert shares[2] < (0.03 if make is residual else 0.02)
    for a, b in zip(*(quantizer.state_dict().values() for quantizer in quantizers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [residual, grouped])
def test_codes_are_put_on_latents(make):
    """On those of every group, and of residual ones the first's alone: nothing is left of these latents."""
    quantizer, rows = make(), latents(SIZE, seed=2)[0].T
    before = [level.projection.weight.clone() for level in quantizer.levels]
    put_codes_on([quantizer], rows)
    found = quantizer.codebook()
    torch.testing.assert_close(found, rows, rtol=0, atol=1e-4)
    moved = [
        not torch.equal(level.projection.weight, then)
        for level, then in zip(quantizer.levels, before, strict=True)
    ]
    assert moved == [True, make is grouped, make is grouped]


def test_whitened_codes_narrow_from_level_to_level():
    quantizer = residual()
    whiten_codes(quantizer)
    spreads = [float(level.codebook().std()) for level in quantizer.levels]
    narrowing = SIZE ** (-1 / WIDTH)
    assert spreads == pytest.approx([1, narrowing, narrowing**2], rel=0.1)
    whiten_codes(single := grouped())
    assert [float(level.codebook().std()) for level in single.levels] == pytest.approx(
        [1, 1, 1], rel=0.15
    )


def test_each_quantizer_is_counted_for_itself():
    counter = CodeCounter(4, torch.device("cpu"), quantizers=2)
    counter.update(torch.tensor([[[[0, 1]], [[3, 3]]]]))  # (B, Q, h, w)
    counter.update(torch.tensor([[[2]]]))  # the first quantizer alone
    assert counter.counts.tolist() == [[1, 1, 1, 0], [0, 0, 0, 2]]
    usage = CodeUsage.from_counts(counter.counts)
    assert [one.utilisation for one in usage.each] == [0.75, 0.25]
    assert (usage.utilisation, usage.tokens, usage.codebook_size) == (0.5, 3, 4)
    assert usage.perplexity == pytest.approx((3 + 1) / 2)
    assert usage.metrics()["utilisation_2"] == 0.25
    assert "by quantizer 75.0%, 25.0%" in str(usage)
