"""Attention at the lowest resolution of the image tokenizer: its places, its result, models without it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq import SimVQImageConfig, SimVQImageModel, attention_in_pieces
from modeling_simvq.attention_in_pieces import attend
from modeling_simvq.modeling_simvq_image import Attention

SIZES = {"base_channels": 8, "norm_groups": 2, "channel_multipliers": [1, 2, 3]}
SIZES |= {"num_res_blocks": 2, "codebook_size": 50, "codebook_dim": 6}


def make(**more) -> SimVQImageModel:
    torch.manual_seed(0)
    return SimVQImageModel(SimVQImageConfig(**SIZES, **more)).eval()


@pytest.fixture(scope="module")
def model() -> SimVQImageModel:
    """4 x down-sampling, random weights, evaluation mode. Do not change it."""
    return make(attention=True)


def places(model: SimVQImageModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def test_it_follows_each_block_of_the_lowest_level_and_stands_between_those_of_the_middle(model):
    of_levels = [f"encoder.levels.2.blocks.{i}" for i in (1, 3)]
    of_levels += [f"decoder.levels.0.blocks.{i}" for i in (1, 3)]
    assert set(places(model)) == {*of_levels, "encoder.mid.1", "decoder.mid.1"}
    assert len(model.encoder.mid) == len(model.decoder.mid) == 3
    assert places(SimVQImageModel(SimVQImageConfig(**SIZES | {"num_res_blocks": 1}))) == []
    deeper = SimVQImageModel(SimVQImageConfig(**SIZES | {"num_res_blocks": 1}, attention=True))
    assert places(deeper) == ["encoder.levels.2.blocks.1", "decoder.levels.0.blocks.1"]


def test_without_it_nothing_changes():
    """Same weights under the same names, drawn in the same order: the published models stay as they are."""
    plain = make()
    assert places(plain) == []
    assert not [name for name in plain.state_dict() if ".query." in name or ".key." in name]
    assert plain.config.attention is False
    old = {k: v for k, v in plain.config.to_dict().items() if k != "attention"}
    torch.manual_seed(0)
    again = SimVQImageModel(SimVQImageConfig.from_dict(old)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in plain.state_dict().items())


@settings(max_examples=15, deadline=None)
@given(height=st.integers(4, 50), width=st.integers(4, 50), batch=st.integers(1, 2))
def test_any_size_works_and_comes_back_rounded_up(model, height, width, batch):
    with torch.no_grad():
        output = model(torch.rand(batch, 3, height, width) * 2 - 1)
    rows, columns = -(-height // 4), -(-width // 4)
    assert output.image_codes.shape == (batch, rows, columns)
    assert output.pixel_values.shape == (batch, 3, 4 * rows, 4 * columns)
    assert output.pixel_values.isfinite().all()


@torch.no_grad()
def test_it_is_the_attention_of_the_definition():
    """Softmax of the scaled products over all positions, written out."""
    torch.manual_seed(0)
    layer, hidden = Attention(8, SimVQImageConfig(**SIZES)), torch.randn(2, 8, 3, 5)
    normed = layer.norm(hidden)
    query, key, value = (part(normed).flatten(2) for part in (layer.query, layer.key, layer.value))
    scores = torch.einsum("bct,bcs->bts", query, key) / 8**0.5
    gathered = torch.einsum("bts,bcs->bct", scores.softmax(dim=-1), value)
    expected = hidden + layer.out(gathered.view(2, 8, 3, 5))
    torch.testing.assert_close(layer(hidden), expected)


@torch.no_grad()
def test_every_position_sees_all_others(model):
    layer = model.encoder.mid[1]
    hidden = torch.randn(1, 24, 12, 12)
    changed = hidden.clone()
    changed[..., -1, -1] += 1
    reach = (layer(changed) - layer(hidden)).abs().sum(dim=1)
    assert (reach > 0).all()


@pytest.mark.parametrize("gradients", [False, True])
def test_pieces_give_what_the_whole_gives(monkeypatch, gradients):
    torch.manual_seed(0)
    sequences = [torch.randn(2, 6, 23, requires_grad=gradients) for _ in range(3)]
    allowed = torch.ones(2, 1, 23, dtype=torch.bool)
    allowed[1, :, 15:] = False
    for mask in (None, allowed):
        whole = attend(*sequences, mask)
        monkeypatch.setattr(attention_in_pieces, "QUERIES_AT_A_TIME", 5)
        pieces = attend(*sequences, mask)
        monkeypatch.undo()
        assert whole.shape == (2, 6, 23)
        torch.testing.assert_close(pieces, whole)
        if gradients:
            expected = torch.autograd.grad(whole.square().sum(), sequences)
            torch.testing.assert_close(
                torch.autograd.grad(pieces.square().sum(), sequences), expected
            )


@torch.no_grad()
def test_a_large_image_is_attended_in_pieces(model, monkeypatch):
    pixels = torch.rand(1, 3, 32, 44) * 2 - 1
    whole = model(pixels)
    seen = []
    attention = F.scaled_dot_product_attention

    def counted(query, *others, **more):
        seen.append(query.shape[2])
        return attention(query, *others, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(attention_in_pieces, "QUERIES_AT_A_TIME", 40)
    pieces = model(pixels)
    assert set(seen) == {40, 88 - 80}
    torch.testing.assert_close(pieces.latents, whole.latents)
    assert torch.equal(pieces.image_codes, whole.image_codes)
    torch.testing.assert_close(pieces.pixel_values, whole.pixel_values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_decoder_takes_other_sizes(model, monkeypatch):
    monkeypatch.setattr(attention_in_pieces, "QUERIES_AT_A_TIME", 40)
    sizes = {"latents": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    exported = torch.export.export(
        model.decoder, (torch.randn(1, 6, 4, 5),), dynamic_shapes=sizes
    ).module()
    latents = torch.randn(1, 6, 9, 8)
    torch.testing.assert_close(exported(latents), model.decoder(latents), rtol=1e-4, atol=1e-5)


def gradients_of(model: SimVQImageModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(pixels)
    (F.mse_loss(output.pixel_values, pixels) + output.commitment_loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_every_weight_learns_and_checkpointing_changes_no_gradient():
    model, pixels = make(attention=True).train(), torch.rand(2, 3, 16, 20) * 2 - 1
    plain = gradients_of(model, pixels)
    assert len(plain) == len(list(model.parameters())) - 1  # all but C
    # A constant added to all keys moves every score of a query alike: their biases have no gradient.
    still = [name for name, grad in plain.items() if grad.abs().max() < 1e-9]
    assert all(name.endswith("key.bias") for name in still)
    model.gradient_checkpointing_enable()
    assert model.encoder.mid[1].gradient_checkpointing
    saved = gradients_of(model, pixels)
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name])


@torch.no_grad()
def test_it_survives_save_and_load(model, tmp_path):
    pixels = torch.rand(1, 3, 21, 18) * 2 - 1
    model.save_pretrained(tmp_path)
    again = SimVQImageModel.from_pretrained(tmp_path)
    assert again.config.attention and (tmp_path / "attention_in_pieces.py").is_file()
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )
    torch.testing.assert_close(again(pixels).pixel_values, model(pixels).pixel_values)


@torch.no_grad()
def test_tiling_keeps_shapes():
    model = make(attention=True)
    model.enable_tiling(tile_size=16, overlap=8)
    for height, width in ((37, 51), (16, 90), (5, 40)):
        output = model(torch.rand(1, 3, height, width) * 2 - 1)
        assert output.pixel_values.shape[-2:] == (-(-height // 4) * 4, -(-width // 4) * 4)
        assert output.pixel_values.isfinite().all()


@torch.no_grad()
def test_half_precision_and_channels_last(model):
    pixels = torch.rand(2, 3, 24, 20) * 2 - 1
    expected = model(pixels)
    half = make(attention=True).to(torch.bfloat16)
    assert half(pixels).pixel_values.dtype == torch.bfloat16
    model = make(attention=True).to(memory_format=torch.channels_last)
    output = model(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output.pixel_values, expected.pixel_values, rtol=1e-4, atol=1e-5)


def test_the_estimate_of_parameters_counts_it():
    """A model that is too large because of its attention alone is refused before it is made."""
    sizes = {"base_channels": 10976, "channel_multipliers": [1], "num_res_blocks": 1}
    SimVQImageConfig(**sizes, codebook_size=2, codebook_dim=1)
    with pytest.raises(ValueError, match="parameters, more than"):
        SimVQImageConfig(**sizes, codebook_size=2, codebook_dim=1, attention=True)
