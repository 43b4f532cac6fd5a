"""Codes, class labels and token ids of any integer type; anything else is refused by name."""

import numpy as np
import pytest
import torch

from modeling_simvq import (
    CodeVocabulary,
    SimVQ,
    SimVQAudioConfig,
    SimVQAudioGenerationConfig,
    SimVQAudioModel,
    SimVQForAudioGeneration,
    SimVQForImageGeneration,
    SimVQImageConfig,
    SimVQImageGenerationConfig,
    SimVQImageModel,
)
from modeling_simvq.code_cross_entropy import chunked_cross_entropy
from modeling_simvq.integer_codes import INTEGER_TYPES, integers
from modeling_simvq.quantizer_names import QUANTIZERS

K = 64
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "codebook_size": K}
IMAGE = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1}
FORMS = {str(dtype): lambda codes, dtype=dtype: codes.to(dtype) for dtype in INTEGER_TYPES} | {
    name: lambda codes, name=name: codes.numpy().astype(name)
    for name in ("i1", "u2", "<i4", ">u4", ">i8", "u8")
}
FORMS["list"] = lambda codes: codes.tolist()
NOT_CODES = {
    "torch.bool": lambda codes: codes.bool(),
    "torch.float32": lambda codes: codes.float(),
    "torch.float16": lambda codes: codes.half(),
    "torch.complex64": lambda codes: codes.cfloat(),
    "float64": lambda codes: codes.numpy().astype(float),
    "bool": lambda codes: codes.bool().tolist(),
    "complex128": lambda codes: codes.numpy().astype(complex),
    "object": lambda codes: codes.numpy().astype(object),
    "<U1": lambda codes: ["a"],
    "one array": lambda codes: [[[1, 2], [3]]],
}


def users():
    """Every place that takes codes, with the shape that it takes."""
    torch.manual_seed(0)
    image = SimVQImageModel(SimVQImageConfig(codebook_size=K, codebook_dim=8, **IMAGE)).eval()
    config = SimVQAudioConfig(
        num_filters=2, hidden_size=32, intermediate_size=32, num_decoder_layers=1, codebook_size=K
    )
    audio = SimVQAudioModel(config).eval()
    config = SimVQImageGenerationConfig(grid_size=(2, 3), num_classes=5, **SMALL)
    pictures = SimVQForImageGeneration(config).eval()
    config = SimVQImageGenerationConfig(grid_size=(2, 3), code_factors=(8, 8), **SMALL)
    factors = SimVQForImageGeneration(config).eval()
    sounds = SimVQForAudioGeneration(SimVQAudioGenerationConfig(max_codes=16, **SMALL)).eval()
    vocabulary = CodeVocabulary("image", 1, 2, 3, K)
    hidden, table = torch.randn(6, 4), torch.randn(K, 4)
    ids = torch.tensor([[1, 3, 4, 5, 2]])
    found = {
        "SimVQ.lookup": ((1, 2, 3), SimVQ(K, 8).lookup),
        "image decode": ((1, 2, 3), lambda codes: image.decode(codes).pixel_values),
        "audio decode": ((1, 1, 4), lambda codes: audio.decode(codes).audio_values),
        "image generator": ((1, 2, 3), lambda codes: pictures(image_codes=codes).loss),
        "flat codes": ((1, 6), lambda codes: factors(image_codes=codes).loss),
        "audio generator": ((2, 1, 4), lambda codes: sounds(audio_codes=codes).loss),
        "prompt": (
            (2, 1, 4),
            lambda codes: sounds.generate_audio(2, codes, do_sample=False).audio_codes,
        ),
        "step": ((2, 3), lambda codes: pictures(input_ids=codes).logits),
        "vocabulary": ((1, 2, 3), vocabulary.to_ids),
        "cross-entropy": ((6,), lambda codes: chunked_cross_entropy(hidden, table, codes)),
    }
    for name in QUANTIZERS:
        options = {"basis_dim": 8} if name == "lc" else {"levels": [8, 8]} if name == "fsq" else {}
        made = SimVQImageConfig(
            quantizer=name, quantizer_options=options, codebook_size=K, codebook_dim=8, **IMAGE
        )
        found[name] = ((1, 2, 3), SimVQImageModel(made).quantizer.eval().lookup)
    labels = torch.zeros(2, 6, dtype=torch.int64)
    found["class labels"] = (
        (2,),
        lambda codes: pictures(image_codes=labels, class_labels=codes).loss,
    )
    found["classes to make"] = (
        (2,),
        lambda codes: pictures.generate_images(codes, do_sample=False),
    )
    return found, vocabulary, ids


USERS, VOCABULARY, IDS = users()


@pytest.mark.parametrize("user", USERS)
def test_codes_of_any_integer_type_give_the_same(user):
    shape, use = USERS[user]
    codes = torch.arange(torch.Size(shape).numel()).view(shape) % 6
    with torch.no_grad():
        expected = use(codes)
        for name, form in FORMS.items():
            assert torch.equal(use(form(codes)), expected), name


@pytest.mark.parametrize("user", USERS)
def test_anything_else_is_refused_by_name(user):
    shape, use = USERS[user]
    codes = torch.ones(shape, dtype=torch.int64)
    for name, form in NOT_CODES.items():
        with pytest.raises(ValueError, match=name):
            use(form(codes))


@pytest.mark.parametrize("dtype", [torch.uint64, torch.int64, torch.uint32])
def test_codes_out_of_range_are_named_whatever_their_type(dtype):
    for user in ("SimVQ.lookup", "vq", "image decode", "image generator", "audio generator"):
        shape, use = USERS[user]
        codes = torch.full(shape, K + 3).to(dtype)
        with pytest.raises(ValueError, match=str(K + 3)):
            use(codes)
    if dtype == torch.uint64:
        largest = torch.full((1, 2, 3), 2**64 - 1, dtype=dtype)
        for codes in (largest, largest.numpy()):
            with pytest.raises(ValueError, match=str(2**64 - 1)):
                SimVQ(K, 8).lookup(codes)


def test_token_ids_of_any_integer_type_become_codes():
    expected = VOCABULARY.to_codes(IDS, (1, 3))
    for form in FORMS.values():
        assert torch.equal(VOCABULARY.to_codes(form(IDS), (1, 3)), expected)
        assert torch.equal(VOCABULARY.mask(form(IDS)), torch.ones(1, 5, dtype=torch.bool))


def test_masks_may_be_arrays_like_the_codes():
    _, use = USERS["audio generator"]
    sounds, codes = use.__closure__[0].cell_contents, torch.ones(2, 1, 4, dtype=torch.int64)
    mask = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 0, 0]]])
    expected = sounds(audio_codes=codes, audio_codes_mask=mask).loss
    found = sounds(audio_codes=codes.numpy(), audio_codes_mask=mask.numpy().astype(np.uint16)).loss
    assert torch.equal(found, expected)


def test_what_is_int64_already_is_not_copied():
    codes = torch.arange(3)
    assert integers("codes", codes).data_ptr() == codes.data_ptr()
