"""Image tokenizers of other libraries behind the face of ours."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.support import tiny_peers
from training.peers.face import bits_of
from training.peers.opening import open_image_tokenizer
from training.runtime.errors import SettingsError

PIXELS = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def opened(model, folder, **options):
    return open_image_tokenizer(tiny_peers.save(model, folder), **options)


@torch.no_grad()
def test_vq_model_reconstructs_what_diffusers_does_from_its_codes_alone(tmp_path):
    model = tiny_peers.vq_model().eval()
    output = opened(model, tmp_path)(PIXELS)
    torch.testing.assert_close(output.pixel_values, model(PIXELS).sample, atol=1e-4, rtol=1e-4)
    assert output.image_codes.shape == (2, 16, 12) and output.image_codes.unique().numel() > 1
    assert bits_of(output, output.image_codes, 32).tolist() == [16 * 12 * math.log2(32)] * 2


@torch.no_grad()
def test_vq_model_with_lookup_and_pixels_from_0_to_1(tmp_path):
    """aMUSEd's: decode takes the codes themselves."""
    model = tiny_peers.vq_model(lookup_from_codebook=True).eval()
    output = opened(model, tmp_path, pixel_range=(0.0, 1.0))(PIXELS)
    theirs = model((PIXELS + 1) / 2).sample * 2 - 1
    torch.testing.assert_close(output.pixel_values, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_autoencoder_kl_has_no_codes(tmp_path):
    model = tiny_peers.autoencoder_kl().eval()
    peer = opened(model, tmp_path)
    output = peer(PIXELS)
    torch.testing.assert_close(output.pixel_values, model(PIXELS).sample)
    assert output.image_codes is None and bits_of(output, None, None) is None
    assert "no discrete code" in peer.config.note


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_peers.emu3, tiny_peers.whole_emu3])
def test_emu3_alone_and_out_of_the_whole_model(tmp_path, make):
    whole = make().eval()
    model = whole if make is tiny_peers.emu3 else whole.model.vqmodel
    output = opened(whole, tmp_path)(PIXELS)
    codes = torch.stack(model.encode(PIXELS, image_sizes=torch.tensor([[32, 24]] * 2)).image_tokens)
    assert output.image_codes.equal(codes) and codes.shape == (2, 16, 12)
    torch.testing.assert_close(output.pixel_values, model.decode(codes))


@torch.no_grad()
def test_janus_searches_as_its_decoder_reads(tmp_path):
    """Codes of other lengths have the same meaning, so that the search must not see them."""
    model = tiny_peers.janus().eval()
    lengths = torch.linspace(0.1, 10, 32)[:, None]
    model.quantize.embedding.weight *= lengths
    peer = opened(model, tmp_path)
    output = peer(PIXELS)
    latents = model.quant_conv(model.encoder(PIXELS))
    cosines = torch.nn.functional.cosine_similarity(
        latents[:, None], model.quantize.embedding.weight[None, :, :, None, None], dim=2
    )
    assert output.image_codes.equal(cosines.argmax(dim=1))
    assert output.pixel_values.shape == PIXELS.shape  # of another size than num_patches says
    square = PIXELS.new_zeros(1, 3, 32, 32)
    output = peer(square)
    torch.testing.assert_close(output.pixel_values, model.decode(output.image_codes.flatten(1)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "chameleon_vqgan"}, "Chameleon's tokenizer has no decoder"),
        (
            {"model_type": "bert"},
            r"\(bert\) is no image tokenizer that is known here: SimVQ; of diff",
        ),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"hidden_size": 3}, "names a model_type or a _class_name"),
    ],
)
def test_other_models_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=message):
        open_image_tokenizer(str(tmp_path))


def test_a_pipeline_has_a_tokenizer_in_it(tmp_path):
    tiny_peers.save(tiny_peers.vq_model(), tmp_path / "vqvae")
    with pytest.raises(SettingsError, match="subfolder=vae"):
        open_image_tokenizer(str(tmp_path))
    assert open_image_tokenizer(str(tmp_path), subfolder="vqvae").config.codebook_size == 32


def test_missing_weights_are_not_filled_with_random_ones(tmp_path):
    tiny_peers.save(tiny_peers.vq_model(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["quantize.embedding.weight"]
    save_file(weights, file)
    with pytest.raises((SettingsError, ValueError), match="quantize.embedding.weight"):
        open_image_tokenizer(str(tmp_path))


def test_no_pickle_is_read(tmp_path):
    tiny_peers.vq_model().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        open_image_tokenizer(str(tmp_path))
