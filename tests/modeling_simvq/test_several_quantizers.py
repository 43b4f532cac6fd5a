"""Several codes a position: residual and grouped quantizers, their prefixes, and one quantizer as it was."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from modeling_simvq import (
    SimVQ,
    SimVQAudioConfig,
    SimVQAudioModel,
    SimVQImageConfig,
    SimVQImageModel,
)
from modeling_simvq.__main__ import main
from modeling_simvq.quantization_baselines import make_quantizer
from modeling_simvq.several_quantizers import GroupedQuantizer, ResidualQuantizer
from modeling_simvq.straight_through import rotate
from tests.modeling_simvq.tiny import AUDIO, IMAGE

Q = 3
ARRANGEMENTS = pytest.mark.parametrize("arrangement", ["residual", "grouped"])


def image_model(**options):
    torch.manual_seed(0)
    sizes = IMAGE | {"codebook_dim": 12, "num_quantizers": Q}
    return SimVQImageModel(SimVQImageConfig(**sizes | options))


def audio_model(**options):
    torch.manual_seed(0)
    sizes = AUDIO | {"codebook_dim": 12, "num_quantizers": Q}
    return SimVQAudioModel(SimVQAudioConfig(**sizes | options))


def quantizer(arrangement: str, **options):
    torch.manual_seed(0)
    if arrangement == "residual":
        return ResidualQuantizer([SimVQ(64, 12) for _ in range(Q)], **options)
    return GroupedQuantizer([SimVQ(64, 12 // Q) for _ in range(Q)], **options)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["residual", "grouped"]),
    st.integers(1, Q),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
)
def test_codes_decode_to_what_was_quantized(arrangement, count, spatial):
    several = quantizer(arrangement).eval()
    latents = torch.randn(2, 12, *spatial)
    with torch.no_grad():
        quantized, codes, loss = several(latents, count)
        assert codes.shape == (2, count, *spatial) and codes.dtype == torch.int64
        assert torch.equal(several.lookup(codes), quantized)
        assert torch.equal(several.lookup(codes.numpy()), quantized)
        more = several(latents)[1]
        assert torch.equal(more[:, :count], codes), "a prefix of the codes is the codes of a prefix"
    assert loss.shape == () and loss.dtype == torch.float32


def test_each_level_of_a_residual_codes_what_is_left():
    several = quantizer("residual").eval()
    latents, rest = torch.randn(2, 12, 7), None
    with torch.no_grad():
        _, codes, loss = several(latents)
        losses, rest = [], latents
        for index, level in enumerate(several.levels):
            vectors, found, cost = level(rest)
            assert torch.equal(found, codes[:, index])
            rest = rest - vectors
            losses.append(cost)
    torch.testing.assert_close(loss, sum(losses))


@ARRANGEMENTS
def test_gradients(arrangement):
    """The encoder's is the output's own, once, and the losses'; every W learns; no basis does."""
    several = quantizer(arrangement)
    latents = torch.randn(2, 12, 9, requires_grad=True)
    weights = torch.randn(2, 12, 9)
    quantized, _, _ = several(latents)
    (quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    several(latents)[2].backward()
    for level in several.levels:
        assert level.projection.weight.grad.abs().sum() > 0 and level.basis.grad is None


@ARRANGEMENTS
def test_the_rotation_trick_turns_the_gradient_of_the_whole(arrangement):
    several = quantizer(arrangement)
    latents = torch.randn(2, 12, 9, requires_grad=True)
    weights = torch.randn(2, 12, 9)
    plain = several(latents)[0]
    for level in several.levels:
        level.rotation_trick = True
    turned = several(latents)[0]
    assert torch.equal(plain, turned)
    found, expected = (
        torch.autograd.grad((values * weights).sum(), latents)[0]
        for values in (turned, rotate(latents, plain.detach()))
    )
    assert torch.equal(found, expected) and not torch.allclose(found, weights)


@ARRANGEMENTS
def test_dropout_draws_prefixes_and_leaves_no_parameter_without_gradient(arrangement):
    several = quantizer(arrangement, dropout=1.0)
    latents, counts = torch.randn(2, 12, 9), set()
    for _ in range(30):
        several.zero_grad()
        _, codes, loss = several(latents)
        loss.backward()
        counts.add(codes.shape[1])
        assert all(p.grad is not None for p in several.parameters() if p.requires_grad)
    assert counts == {1, 2, 3}
    assert several.eval()(latents)[1].shape[1] == Q


@ARRANGEMENTS
@torch.no_grad()
def test_an_image_model(arrangement, tmp_path):
    model = image_model(quantizer_arrangement=arrangement).eval()
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert not any(level.basis.requires_grad for level in model.quantizer.levels)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    errors = []
    for count in (1, 2, None):
        encoded = model.encode(pixels, num_quantizers=count)
        assert encoded.image_codes.shape == (2, count or Q, 8, 12)
        decoded = model.decode(encoded.image_codes).pixel_values
        again = model.decode(quantized_latents=encoded.quantized_latents).pixel_values
        assert torch.equal(decoded, again) and decoded.shape == pixels.shape
        errors.append((encoded.latents - encoded.quantized_latents).square().mean())
    if arrangement == "residual":
        assert errors[0] > errors[1] > errors[2]
    assert torch.equal(model(pixels).pixel_values, decoded)
    with pytest.raises(ValueError, match=r"must be \(B, q, h, w\)"):
        model.decode(encoded.image_codes[:, 0])
    with pytest.raises(
        ValueError, match="num_quantizers must be a whole number from 1 to 3, got 4"
    ):
        model.encode(pixels, num_quantizers=4)
    with pytest.raises(ValueError, match="from 1 to 3, got 4"):
        model.decode(torch.zeros(1, 4, 2, 2, dtype=torch.int64))


@ARRANGEMENTS
@pytest.mark.parametrize("streaming", [False, True])
@torch.no_grad()
def test_an_audio_model(arrangement, streaming):
    model = audio_model(quantizer_arrangement=arrangement, streaming=streaming).eval()
    waveforms, mask = torch.rand(2, 1, 160) - 0.5, torch.ones(2, 160)
    mask[1, 100:] = 0
    rates = model.config.target_bandwidths
    assert rates == [pytest.approx(18.0 * count) for count in (1, 2, 3)]
    for name, value, count in (
        *(("num_quantizers", 2, 2), ("n_quantizers", 1, 1), ("bandwidth", rates[1], 2)),
        ("num_quantizers", None, Q),
    ):
        encoded = model.encode(waveforms, mask, **{name: value})
        assert encoded.audio_codes.shape == (2, count, 20)
        assert encoded.audio_codes_mask.shape == (2, 1, 20)
        decoded = model.decode(encoded.audio_codes, audio_codes_mask=encoded.audio_codes_mask)
        assert decoded.audio_values.shape == (2, 1, 160)
        alone = model.encode(waveforms[1:, :, :100], **{name: value}).audio_codes
        assert torch.equal(alone[..., :12], encoded.audio_codes[1:, :, :12])
    with pytest.raises(
        ValueError, match="bandwidth must be left out, got 7: this model gives 18 or 36"
    ):
        model.encode(waveforms, bandwidth=7)
    with pytest.raises(ValueError, match="bandwidth must be left out, or fit num_quantizers"):
        model.encode(waveforms, num_quantizers=1, bandwidth=rates[1])
    with pytest.raises(ValueError, match=r"must be \(B, q, T\), q up to 3"):
        model.decode(torch.zeros(1, 4, 9, dtype=torch.int64))


@ARRANGEMENTS
def test_a_stream(arrangement):
    model = audio_model(quantizer_arrangement=arrangement, streaming=True).eval()
    waveforms = torch.rand(2, 1, 163) - 0.5
    stream = model.stream(2)
    codes, samples = [], []
    for piece in waveforms.split(37, dim=-1):
        codes.append(stream.encode(piece))
        samples.append(stream.decode(codes[-1]))
    last_codes, last_samples = stream.flush()
    codes, samples = torch.cat([*codes, last_codes], -1), torch.cat([*samples, last_samples], -1)
    with torch.no_grad():
        whole = model.encode(waveforms).audio_codes
        torch.testing.assert_close(samples, model.decode(whole).audio_values, rtol=0, atol=1e-6)
    assert torch.equal(codes, whole)
    assert stream.encode(waveforms[..., :0]).shape == (2, Q, 0)


def test_one_quantizer_is_what_it_was():
    """To the bit, and under the same names."""
    one, several = image_model(num_quantizers=1).eval(), image_model().eval()
    assert type(one.quantizer) is SimVQ and "quantizer.basis" in one.state_dict()
    assert sum(p.numel() for p in several.quantizer.parameters()) == Q * sum(
        p.numel() for p in one.quantizer.parameters()
    )
    trained = sum(p.numel() for p in several.quantizer.parameters() if p.requires_grad)
    assert trained == Q * (12 * 12 + 12)  # O(Q d^2), whatever K
    with torch.no_grad():
        pixels = torch.rand(1, 3, 16, 16)
        assert one.encode(pixels).image_codes.shape == (1, 8, 8)
        assert torch.equal(
            one.encode(pixels, num_quantizers=1).image_codes, one.encode(pixels).image_codes
        )
    with pytest.raises(ValueError, match="from 1 to 1, got 2"):
        one.encode(pixels, num_quantizers=2)


@ARRANGEMENTS
def test_a_shared_basis(arrangement, tmp_path):
    """C is stored once, never trained, and follows the owner's; each W is its own. Copies keep their own C."""
    model = image_model(quantizer_arrangement=arrangement, share_basis=True).eval()
    names = [name for name in model.state_dict() if name.endswith("basis")]
    assert names == ["quantizer.levels.0.basis"]
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model.encode(pixels).image_codes
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(again.encode(pixels).image_codes, expected)
        copied = copy.deepcopy(model)
        assert copied.quantizer.levels[1].basis is copied.quantizer.levels[0].basis
        model.quantizer.levels[0].basis.mul_(3.0)  # seen by all: the kept codebooks are made anew
        assert not torch.equal(model.encode(pixels).image_codes[:, 1:], expected[:, 1:])
        assert torch.equal(copied.encode(pixels).image_codes, expected)
    bases = [level.basis for level in again.quantizer.levels]
    assert all(basis is bases[0] for basis in bases) and not bases[0].requires_grad
    copied.fold_codebook()
    with torch.no_grad():
        assert torch.equal(copied.encode(pixels).image_codes, expected)


def test_what_has_no_basis_shares_none():
    with pytest.raises(ValueError, match="share_basis: the quantizer fsq has no basis to share"):
        image_model(share_basis=True, quantizer="fsq")


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="codebook_dim must be a multiple of num_quantizers = 5"):
        image_model(num_quantizers=5, quantizer_arrangement="grouped")
    with pytest.raises(ValueError, match="quantizer_arrangement must be one of residual, grouped"):
        image_model(quantizer_arrangement="stacked")


@pytest.mark.parametrize("make", [image_model, audio_model])
def test_the_commands(make, tmp_path, capsys):
    """encode, decode and info with several codes a position."""
    from PIL import Image

    from modeling_simvq import SimVQAudioFeatureExtractor, SimVQImageProcessor
    from modeling_simvq.wav_file import wav_of_samples

    model, folder = make(), tmp_path / "model"
    model.save_pretrained(folder)
    (tmp_path / "in").mkdir()
    if make is image_model:
        SimVQImageProcessor(size_divisor=2).save_pretrained(folder)
        Image.new("RGB", (24, 16), "red").save(tmp_path / "in" / "a.png")
    else:
        SimVQAudioFeatureExtractor(sampling_rate=24_000, hop_length=8).save_pretrained(folder)
        (tmp_path / "in" / "a.wav").write_bytes(wav_of_samples(torch.rand(4000) - 0.5, 24_000))
    options = ["--model", str(folder), "--output"]
    assert main(["encode", str(tmp_path / "in"), *options, str(tmp_path / "codes")]) == 0
    assert main(["decode", str(tmp_path / "codes"), *options, str(tmp_path / "out")]) == 0
    assert [path.stem for path in (tmp_path / "out").iterdir()] == ["a"]
    assert main(["info", str(folder)]) == 0
    assert "3 at each position, residual" in capsys.readouterr().out


def test_a_folder_saved_before_there_were_several(tmp_path):
    model = image_model(num_quantizers=1).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_quantizers", "quantizer_arrangement", "quantizer_dropout", "share_basis"):
        config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path).encode(pixels).image_codes
        assert torch.equal(again, model.encode(pixels).image_codes)


def test_what_only_simvq_has_is_not_asked_of_other_levels():
    pytest.importorskip("vector_quantize_pytorch")
    config = SimVQImageConfig(codebook_size=32, codebook_dim=8, quantizer="vq", num_quantizers=2)
    make_quantizer(config).forget_codebook()
    with pytest.raises(ValueError, match="simvq and lc have a W to fold, this one is 'vq'"):
        SimVQImageModel(config).fold_codebook()
    config.quantizer = "lc"
    folded = SimVQImageModel(config).eval()
    before = folded.quantizer.codebook()
    folded.fold_codebook()
    assert torch.allclose(folded.quantizer.codebook(), before, atol=1e-6)
