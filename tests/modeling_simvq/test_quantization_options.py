"""Options of SimVQ: each trains, and each survives being saved and folded."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_simvq import SimVQ

OPTIONS = {
    "plain": {},
    "rotation": {"rotation_trick": True},
    "narrow basis": {"basis_dim": 3},
    "wide basis": {"basis_dim": 20},
    "perceptron": {"projection_hidden_dim": 24},
    "trained basis": {"train_basis": True},
    "uniform": {"basis_init": "uniform"},
    "orthogonal": {"basis_init": "orthogonal"},
    "given": {"basis_init": torch.linspace(-1, 1, 64 * 8).view(64, 8).sin()},
}


def make(name: str) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(64, 8, **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tokens", [20, 200])  # fewer and more than codes: two ways to project
def test_every_option_trains(name, tokens):
    quantizer = make(name)
    torch.manual_seed(1)
    encoder, data = torch.nn.Conv1d(4, 8, 1), torch.randn(2, 4, tokens // 2)
    basis = quantizer.basis.detach().clone()
    before, losses = quantizer.codebook().clone(), []
    trained = [p for p in (*encoder.parameters(), *quantizer.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(40):
        quantized, _, loss = quantizer(encoder(data))
        total = loss + (quantized - 1).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained)
    assert (quantizer.codebook() != before).any(dim=1).all()
    assert torch.equal(quantizer.basis, basis) != (name == "trained basis")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_state_and_the_folded_codebook_give_the_same_tokens(name):
    quantizer = make(name).eval()
    twin = SimVQ(64, 8, **{k: v for k, v in OPTIONS[name].items() if k != "basis_init"}).eval()
    twin.load_state_dict(quantizer.state_dict())
    folded = copy.deepcopy(quantizer)
    folded.fold_codebook()
    assert torch.equal(folded.projection.weight, torch.eye(8)) and not folded.projection.bias.any()
    latents = torch.randn(2, 8, 30)
    expected, codes, loss = quantizer(latents)
    for other in (twin, folded):
        assert torch.equal(other.codebook(), quantizer.codebook())
        found = other(latents)
        assert torch.equal(found[0], expected) and torch.equal(found[1], codes)
        assert torch.equal(found[2], loss)
        assert torch.equal(other.lookup(codes), quantizer.lookup(codes))


def test_two_ways_to_project_give_the_same_gradients():
    torch.manual_seed(0)
    latents, gradients = torch.randn(2, 8, 100), []
    for size in (64, 100_000):  # 200 tokens: all codes projected, or only the selected ones
        quantizer = SimVQ(64, 8)
        quantizer.load_state_dict(make("plain").state_dict())
        quantizer.codebook_size = size
        z = latents.clone().requires_grad_()
        quantized, _, loss = quantizer(z)
        (quantized.square().sum() + loss).backward()
        gradients.append((z.grad, quantizer.projection.weight.grad, quantizer.projection.bias.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bases_have_the_variance_that_they_promise():
    torch.manual_seed(0)
    for init in ("normal", "uniform", "orthogonal"):
        basis = SimVQ(4096, 16, basis_init=init).basis
        assert basis.square().mean() * 16 == pytest.approx(1, rel=0.05)
    rows = SimVQ(50, 16, basis_init="orthogonal").basis
    torch.testing.assert_close(rows[:16] @ rows[:16].T, torch.eye(16), atol=1e-5, rtol=0)
    assert SimVQ(500, 16, basis_init="uniform").basis.abs().max() <= (3 / 16) ** 0.5


def test_rotation_keeps_the_value_and_turns_the_gradient():
    """arXiv 2410.06424: the gradient keeps its angle to the vector, so q's own direction maps to z's."""
    quantizer = make("rotation")
    latents = torch.randn(1, 8, 50, requires_grad=True)
    quantized, codes, _ = quantizer(latents)
    assert torch.equal(quantized, make("plain")(latents)[0])
    quantized.backward(quantized.detach())
    z, q = latents.detach(), quantized.detach()
    cosines = torch.nn.functional.cosine_similarity(latents.grad, z, dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-4, rtol=0)
    lengths = q.norm(dim=1) ** 2 / z.norm(dim=1)
    torch.testing.assert_close(latents.grad.norm(dim=1), lengths, rtol=1e-3, atol=1e-5)


def test_not_finite_latents_are_an_error_in_evaluation_and_a_nan_loss_in_training():
    quantizer = make("plain")
    latents = torch.randn(1, 8, 4)
    latents[0, 2, 1] = torch.nan
    quantized, codes, loss = quantizer(latents)
    assert loss.isnan() and codes[0, 1] == 0 and codes[0, 2] == make("plain")(latents)[1][0, 2]
    with pytest.raises(ValueError, match="NaN"):
        quantizer.eval()(latents)


def test_a_diverged_codebook_is_an_error_in_evaluation():
    quantizer = make("plain").eval()
    with torch.no_grad():
        quantizer.projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        quantizer.codebook()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"basis_dim": 0}, "basis_dim=0"),
        ({"projection_hidden_dim": -1}, "projection_hidden_dim=-1"),
        ({"basis_init": "kmeans"}, "kmeans"),
        ({"basis_init": torch.zeros(3, 3)}, r"\(3, 3\)"),
    ],
)
def test_impossible_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        SimVQ(64, 8, **options)


def test_wrapping_for_distributed_training_keeps_the_codebook_in_step(tmp_path):
    """One process is enough: the wrapper broadcasts in place, which is how weights change behind our back."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        quantizer = make("plain").eval()
        quantizer.codebook()
        wrapped = DistributedDataParallel(quantizer)
        state = {f"module.{k}": v for k, v in make("uniform").state_dict().items()}
        wrapped.load_state_dict(state)
        assert torch.equal(wrapped.module.codebook(), make("uniform").eval().codebook())
        wrapped.train()
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        wrapped(torch.randn(2, 8, 10))[2].backward()
        before = wrapped.eval().module.codebook().clone()
        optimizer.step()
        assert not torch.equal(wrapped.module.codebook(), before)
        assert wrapped.module.basis.grad is None
    finally:
        dist.destroy_process_group()


def test_without_w_and_with_c_trained_it_is_plain_vq():
    torch.manual_seed(0)
    quantizer = SimVQ(32, 6, train_basis=True, train_projection=False).train()
    assert [name for name, _ in quantizer.named_parameters()] == ["basis"]
    before = quantizer.codebook().clone()
    _, codes, loss = quantizer(torch.randn(8, 6))
    loss.backward()
    torch.optim.SGD(quantizer.parameters(), 0.1).step()
    moved = (quantizer.codebook() - before).abs().amax(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(codes.tolist())
    with pytest.raises(ValueError, match="train_projection=False"):
        SimVQ(32, 6, basis_dim=4, train_projection=False)
