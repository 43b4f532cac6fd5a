"""Whitened latents: moments, the map of evaluation, batches of several processes, models that have it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeling_simvq import SimVQAudioConfig, SimVQAudioModel, SimVQImageConfig, SimVQImageModel
from modeling_simvq.group_norm import ImageNorm
from modeling_simvq.latent_whitening import Whitening

SMALL_IMAGE = {"base_channels": 8, "norm_groups": 2, "channel_multipliers": [1, 2]}
SMALL_IMAGE |= {"num_res_blocks": 1, "codebook_size": 32, "codebook_dim": 4}
SMALL_AUDIO = {"num_filters": 2, "downsampling_ratios": [4, 4], "num_lstm_layers": 1, "n_fft": 32}
SMALL_AUDIO |= {"hidden_size": 32, "intermediate_size": 32, "num_decoder_layers": 1}
SMALL_AUDIO |= {"codebook_size": 32, "codebook_dim": 4}


def correlated(count: int, dim: int, seed: int = 0, mean: float = 30) -> torch.Tensor:
    """Latents (2, d, count) whose directions differ by a factor of 100 in size, far from zero."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=draw) * torch.logspace(-1, 1, dim)
    latents = torch.randn(2, count, dim, generator=draw) @ mixing + mean
    return latents.mT.contiguous()


def rows(latents: torch.Tensor) -> torch.Tensor:
    return latents.movedim(1, -1).flatten(0, -2)


@settings(max_examples=25, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 99))
def test_training_whitens_every_batch(dim, seed):
    # A mean from which float32 can tell the smallest spread that these seeds draw.
    white = rows(Whitening(dim)(correlated(400, dim, seed, mean=3)))
    assert white.mean(dim=0).abs().max() < 1e-2
    spread = torch.linalg.eigvalsh(torch.cov(white.T, correction=0).reshape(dim, dim))
    # The faintest directions keep what the ridge leaves of them, and none becomes larger than one.
    assert spread.min() > 0 and spread.max() < 1.01
    assert spread.max() > 0.98


def test_evaluation_is_the_running_mean_of_training():
    whitening, latents = Whitening(6), correlated(500, 6)
    for _ in range(200):
        trained = whitening(latents)
    weight = whitening.weight.clone()
    evaluated = whitening.eval()(latents)
    torch.testing.assert_close(evaluated, trained, atol=2e-2, rtol=0)
    assert torch.equal(whitening.weight, weight)
    one_at_a_time = torch.cat([whitening(latents[:, :, t : t + 1]) for t in range(500)], dim=2)
    torch.testing.assert_close(one_at_a_time, evaluated)


def test_gradients_pass_through_the_moments():
    """Making all latents larger changes nothing, so that no gradient asks for it."""
    latents = correlated(50, 3).requires_grad_()
    (Whitening(3)(latents) * torch.randn(2, 3, 50)).sum().backward()
    centred = latents.detach() - latents.detach().mean(dim=(0, 2), keepdim=True)
    along = (latents.grad * centred).sum() / (latents.grad.norm() * centred.norm())
    assert latents.grad.norm() > 0
    assert abs(along) < 0.02


def test_latents_that_are_not_finite_leave_the_running_map_alone():
    whitening = Whitening(3)
    whitening(correlated(50, 3))
    weight, bias = whitening.weight.clone(), whitening.bias.clone()
    latents = correlated(50, 3)
    latents[0, 0, 0] = torch.nan
    assert whitening(latents).isnan().any()
    assert torch.equal(whitening.weight, weight) and torch.equal(whitening.bias, bias)


def test_latents_without_variance_stay_finite():
    assert Whitening(3)(torch.full((2, 3, 5), 7.0)).isfinite().all()


def test_only_real_frames_count():
    latents, mask = correlated(60, 3), torch.ones(2, 60, dtype=torch.bool)
    mask[1, 20:] = False
    padded = latents.masked_fill(~mask[:, None], 1e6)
    white = Whitening(3)(padded, mask).mT[mask]
    alone = Whitening(3)(torch.cat([latents[0], latents[1, :, :20]], dim=1)[None])
    torch.testing.assert_close(white, alone[0].T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(half):
    whitening = Whitening(4)
    for _ in range(20):
        whitening(correlated(100, 4))
    exact = whitening.eval()(correlated(100, 4).to(half).float())
    converted = whitening.to(half)
    assert converted.weight.dtype == torch.float32
    assert torch.equal(converted(correlated(100, 4).to(half)), exact.to(half))


MODELS = [
    pytest.param(SimVQImageModel, SimVQImageConfig, SMALL_IMAGE, (4, 3, 16, 16), id="image"),
    pytest.param(SimVQAudioModel, SimVQAudioConfig, SMALL_AUDIO, (4, 1, 640), id="audio"),
]


@pytest.mark.parametrize(("model_class", "config_class", "sizes", "shape"), MODELS)
def test_a_model_keeps_it_through_save_and_load(model_class, config_class, sizes, shape, tmp_path):
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, whiten_latents=True)).train()
    inputs = torch.randn(shape)
    for _ in range(60):
        latents = model(inputs).latents
    spread = torch.cov(rows(latents.detach()).T)
    torch.testing.assert_close(spread, torch.eye(4), atol=0.1, rtol=0)
    model.eval().save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert again.config.whiten_latents
    assert torch.equal(again(inputs).latents, model(inputs).latents)
    assert not torch.equal(again.whitening.weight, torch.eye(4))


@pytest.mark.parametrize(("model_class", "config_class", "sizes", "shape"), MODELS)
def test_without_it_nothing_changes(model_class, config_class, sizes, shape):
    model = model_class(config_class(**sizes))
    assert model.whitening is None
    assert not [name for name in model.state_dict() if "whitening" in name]


def test_a_padded_batch_gives_what_the_clips_give_alone():
    torch.manual_seed(0)
    model = SimVQAudioModel(SimVQAudioConfig(**SMALL_AUDIO, whiten_latents=True)).train()
    clips = torch.randn(2, 1, 640)
    for _ in range(20):
        model(clips)
    model.eval()
    mask = torch.ones(2, 640)
    mask[1, 320:] = 0
    codes = model.encode(clips, mask).audio_codes
    alone = model.encode(clips[1:, :, :320]).audio_codes
    assert torch.equal(codes[1:, :, :20], alone)


def test_a_norm_of_few_groups_keeps_the_colours():
    """The mean of each channel is lost in groups of one channel, and kept against the others in larger ones."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 8, 6, 6)
    tinted = hidden + torch.arange(8.0)[None, :, None, None]
    torch.testing.assert_close(ImageNorm(8, 8)(tinted), ImageNorm(8, 8)(hidden))
    means = ImageNorm(8, 1)(tinted).mean(dim=(2, 3))[0]
    assert (means.diff() > 0.2).all()


def test_a_width_that_does_not_part_into_groups_is_refused():
    with pytest.raises(ValueError, match=r"base_channels must be a multiple of 32 \(norm_groups\)"):
        SimVQImageConfig(base_channels=48)
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of 5 \(norm_groups\)"):
        SimVQAudioConfig(norm_groups=5)
    assert isinstance(SimVQImageModel(SimVQImageConfig(**SMALL_IMAGE)), nn.Module)
