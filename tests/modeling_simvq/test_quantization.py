import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_simvq import SimVQ

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantizer"


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("kind", ["SimVQ", "SimVQ1D"])
@pytest.mark.parametrize("name", ["k1024_d128", "k8192_d16"])
def test_equals_the_original(name, kind):
    fixture = load_file(FIXTURES / f"{name}.safetensors")
    quantizer = SimVQ(*fixture["embedding.weight"].shape)
    quantizer.load_state_dict(
        {
            "basis": fixture["embedding.weight"],
            "projection.weight": fixture["embedding_proj.weight"],
            "projection.bias": fixture["embedding_proj.bias"],
        }
    )
    latents = fixture[f"{kind}.z"].clone().requires_grad_()
    quantized, codes, loss = quantizer(latents)
    assert torch.equal(codes.flatten(), fixture[f"{kind}.new.indices"])
    assert codes.shape == latents.shape[:1] + latents.shape[2:]
    assert relative(quantized, fixture[f"{kind}.new.z_q"]) < 1e-5
    assert relative(loss, fixture[f"{kind}.new.commit_loss"]) < 1e-5
    ((quantized * fixture[f"{kind}.g"]).sum() + loss).backward()
    assert relative(latents.grad, fixture[f"{kind}.new.grad_z"]) < 1e-5
    if f"{kind}.new.grad_proj_weight" in fixture:
        gradient = fixture[f"{kind}.new.grad_proj_weight"]
        assert relative(quantizer.projection.weight.grad, gradient) < 1e-5
    gradient = fixture[f"{kind}.new.grad_proj_bias"]
    assert relative(quantizer.projection.bias.grad, gradient) < 1e-5
    assert quantizer.basis.grad is None


def test_forward_in_evaluation_is_the_lookup_to_the_last_bit():
    quantizer = SimVQ(256, 8).eval()
    latents = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        quantized, codes, _ = quantizer(latents)
        assert torch.equal(quantized, quantizer.lookup(codes))
    quantizer.train()
    quantized, codes, _ = quantizer(latents)
    assert torch.allclose(quantized, quantizer.lookup(codes), atol=1e-6)


def test_half_precision_latents_keep_their_type():
    quantizer = SimVQ(64, 8)
    latents = torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, codes, loss = quantizer(latents)
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(codes, quantizer(latents.float())[1])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


def change_by_step(quantizer):
    optimizer = torch.optim.Adam(p for p in quantizer.parameters() if p.requires_grad)
    quantizer(torch.randn(1, 8, 4))[2].backward()
    optimizer.step()


def change_by_loading(quantizer):
    quantizer.load_state_dict(SimVQ(64, 8).state_dict())


def change_in_place(quantizer):
    with torch.no_grad():
        quantizer.projection.weight.mul_(2)


def change_basis(quantizer):
    with torch.no_grad():
        quantizer.basis.copy_(torch.randn(64, 8))


def change_by_data(quantizer):
    quantizer.projection.bias.data = torch.randn(8)


def change_parameter(quantizer):
    quantizer.projection.weight = torch.nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize(
    "change",
    [
        change_by_step,
        change_by_loading,
        change_in_place,
        change_basis,
        change_by_data,
        change_parameter,
        lambda quantizer: quantizer.to(torch.bfloat16),
        lambda quantizer: quantizer.double(),
        lambda quantizer: quantizer.half(),
    ],
)
def test_the_kept_codebook_follows_every_change(change):
    quantizer = SimVQ(64, 8).eval()
    kept = quantizer._book().codes
    assert same(quantizer._book().codes, kept)
    change(quantizer)
    assert torch.equal(quantizer.codebook(), quantizer._project(quantizer.basis))


def test_copies_and_pickles_have_their_own_codebook():
    quantizer = SimVQ(64, 8).eval()
    kept = quantizer._book().codes
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert twin._kept is None and not twin.basis.requires_grad
        change_in_place(twin)
        assert not torch.equal(twin.codebook(), kept)
    assert same(quantizer._book().codes, kept)
    assert "_kept" not in quantizer.state_dict()
    with torch.inference_mode():
        assert torch.equal(quantizer.codebook(), kept)


def test_the_basis_cannot_be_trained_by_accident():
    quantizer = SimVQ(64, 8)
    quantizer.basis = torch.nn.Parameter(torch.randn(64, 8))  # as loaders do
    assert not quantizer.basis.requires_grad
    quantizer.requires_grad_(True)
    before = quantizer.basis.detach().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    quantized, _, loss = quantizer(torch.randn(2, 8, 3, requires_grad=True))
    (quantized.sum() + loss).backward()
    optimizer.step()
    assert torch.equal(quantizer.basis, before)


def test_every_code_moves_with_every_step():
    """The point of the method: one step moves codes that were not picked."""
    quantizer = SimVQ(64, 8)
    before, latents = quantizer.codebook(), torch.randn(1, 8, 2)
    optimizer = torch.optim.Adam((p for p in quantizer.parameters() if p.requires_grad), lr=0.01)
    quantizer(latents)[2].backward()
    optimizer.step()
    assert (quantizer.codebook() != before).any(dim=1).all()


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        (torch.tensor([[64]]), "64"),
        (torch.tensor([[-3]]), "-3"),
        (torch.tensor([[1.0]]), "float32"),
        (torch.tensor([[True]]), "bool"),
    ],
)
def test_impossible_codes_are_named(codes, word):
    with pytest.raises(ValueError, match=word):
        SimVQ(64, 8).lookup(codes)


def test_impossible_sizes_and_latents_are_named():
    with pytest.raises(ValueError, match="codebook_size=0"):
        SimVQ(0, 8)
    with pytest.raises(ValueError, match=r"\(1, 7, 2\)"):
        SimVQ(4, 8)(torch.zeros(1, 7, 2))
