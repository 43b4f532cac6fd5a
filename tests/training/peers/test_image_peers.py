"""Image tokenizers of other libraries behind the face of ours."""

import math

import pytest
import torch

from tests.training.support import tiny_peers
from training.peers.face import bits_of
from training.peers.opening import open_image_tokenizer

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
