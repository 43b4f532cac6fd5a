"""Every option of transformers' generate either works with the generators or is refused by its name."""

import inspect

import pytest
import torch
from transformers import (
    AutoModel,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
)

from modeling_simvq.generation_options import PASSED_ON
from tests.modeling_simvq.test_generation import audio_model, codes_of, image_model

LABELS = torch.tensor([0, 1, 1])
# A value of each option that is passed on, and others that it needs.
OPTIONS = {
    "bad_words_ids": {"bad_words_ids": [[3], [4, 5]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1]},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "compile_config": {"compile_config": None},
    "disable_compile": {"disable_compile": True},
    "do_sample": {"do_sample": False},
    "early_stopping": {"early_stopping": True, "num_beams": 2},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-3},
    "eta_cutoff": {"eta_cutoff": 1e-3},
    "length_penalty": {"length_penalty": 0.5, "num_beams": 2},
    "logits_processor": {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.1)])},
    "min_p": {"min_p": 0.01},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "num_beams": {"num_beams": 3, "do_sample": False},
    "num_return_sequences": {"num_return_sequences": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [5, 6]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "sequence_bias": {"sequence_bias": [[[3], -5.0]]},
    "streamer": {"streamer": None},
    "suppress_tokens": {"suppress_tokens": [0, 1]},
    "synced_gpus": {"synced_gpus": False},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.9},
    "use_cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def models() -> tuple:
    return image_model(), audio_model()


def test_all_that_are_passed_on_are_tried():
    assert OPTIONS.keys() == PASSED_ON


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_passed_on_gives_whole_samples(option, models):
    image, audio = models
    each = OPTIONS[option].get("num_return_sequences", 1)
    codes = image.generate_images(LABELS, **OPTIONS[option])
    assert codes.shape == (3 * each, 3, 4) and codes.max() < 32
    prompts, mask = codes_of(2, 1, 5), torch.tensor([[[1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0]]])
    made = audio.generate_audio(3, prompts, mask, **OPTIONS[option])
    assert made.audio_codes.shape == (2 * each, 1, 8)
    assert made.audio_codes_mask.sum(-1).flatten().tolist() == [8] * each + [5] * each
    for row, prompt in enumerate(prompts.repeat_interleave(each, dim=0)):
        length = 5 if row < each else 2
        assert torch.equal(made.audio_codes[row, :, :length], prompt[:, :length])


def test_any_other_option_is_refused_by_name(models):
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    own = {"self", "kwargs", "temperature", "top_k", "top_p", "guidance_scale"}
    others = sorted(k for k in known - PASSED_ON - own if not k.startswith("_"))
    assert {"max_new_tokens", "return_dict_in_generate", "assistant_model"} <= set(others)
    for option in [*others, "attention_mask", "past_key_values", "input_ids"]:
        for call in (
            lambda option=option: models[0].generate_images(LABELS, **{option: 1}),
            lambda option=option: models[1].generate_audio(3, **{option: 1}),
        ):
            with pytest.raises(ValueError, match=rf"generate_\w+ does not take {option}\b"):
                call()
    with pytest.raises(ValueError, match=r"always makes 3 \* 4 codes"):
        models[0].generate_images(max_new_tokens=5)
    with pytest.raises(ValueError, match="guidance_scale"):
        models[1].generate_audio(3, guidance_scale=2.0)


def test_what_is_no_option_is_refused_with_the_likely_one(models):
    for call, words in (
        (lambda: models[0].generate_images(class_label=LABELS), "'class_label'.*'class_labels'"),
        (lambda: models[0].generate_images(LABELS, guidance=2.0), "'guidance'"),
        (lambda: models[0].generate_images(LABELS, num_image=2), "'num_image'.*'num_images'"),
        (lambda: models[1].generate_audio(3, tempreature=2.0), "'tempreature'.*'temperature'"),
        (lambda: models[1].generate_audio(3, padding_mask=LABELS), "'padding_mask'"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_guidance_with_several_samples_of_each_label(models):
    """Row by row what guidance gives a single label."""
    image, greedy = models[0], {"guidance_scale": 3.0, "top_k": 1}
    several = image.generate_images(LABELS, num_return_sequences=2, **greedy)
    assert torch.equal(several, image.generate_images(LABELS, num_images=2, **greedy))
    alone = [image.generate_images(LABELS[i : i + 1], **greedy) for i in range(3)]
    assert torch.equal(several, torch.cat(alone).repeat_interleave(2, dim=0))
    for options, words in (
        ({"guidance_scale": 2.0, "num_beams": 2}, "guidance_scale .*num_beams"),
        ({"do_sample": False, "num_return_sequences": 2}, "num_return_sequences .*do_sample"),
        ({"num_beams": 0}, "num_beams .* 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"generator": [torch.Generator()]}, "generator"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            image.generate_images(LABELS, **options)


def test_beams_of_several_prompts(models):
    audio, prompts = models[1], codes_of(2, 1, 5)
    how = {"num_beams": 3, "do_sample": False}
    mask = torch.tensor([[[1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0]]])
    made = audio.generate_audio(4, prompts, mask, num_return_sequences=2, **how)
    for row, length in ((0, 5), (1, 2)):
        alone = audio.generate_audio(
            4, prompts[row : row + 1, :, :length], num_return_sequences=2, **how
        )
        both = made.audio_codes[2 * row : 2 * row + 2, :, : length + 4]
        assert torch.equal(both, alone.audio_codes)
    assert audio.generate_audio(4, prompts, num_clips=3).audio_codes.shape == (6, 1, 9)


def test_a_folder_cannot_end_samples_early(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    GenerationConfig(
        eos_token_id=list(range(32)), pad_token_id=0, num_return_sequences=2, num_beams=2
    ).save_pretrained(tmp_path)
    codes = AutoModel.from_pretrained(tmp_path).generate_images(LABELS)
    assert codes.shape == (3, 3, 4)


def test_labels_of_any_integer_type(models):
    """Beside 32 codes 250 classes do not fit in eight bits."""
    model = image_model(num_classes=250)
    codes = codes_of(3, 3, 4)
    expected = model(image_codes=codes, class_labels=torch.tensor([0, 240, 249])).loss
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32):
        labels = torch.tensor([0, 240, 249]).to(dtype)
        assert model(image_codes=codes, class_labels=labels).loss == expected
        assert model(image_codes=codes, class_labels=labels.numpy()).loss == expected
    for bad in (torch.tensor([True, False, True]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match="class_labels must be integers"):
            model(image_codes=codes, class_labels=bad)


def test_arguments_that_would_do_nothing_in_training(models):
    image, audio = models
    x, y, clip = codes_of(3, 3, 4), LABELS, codes_of(2, 1, 9)
    assert image(image_codes=x, class_labels=y, labels=None).loss > 0
    assert not image.accepts_loss_kwargs and not audio.accepts_loss_kwargs
    for call, words in (
        (lambda: image(image_codes=x, class_label=y), "'class_label'.*'class_labels'"),
        (lambda: image(image_codes=x, labels=y), "no argument 'labels'"),
        (lambda: image(image_codes=x, padding_mask=y), "'padding_mask'"),
        (lambda: audio(audio_codes=clip, padding_mask=clip), "'padding_mask'"),
        (lambda: audio(audio_codes=clip, audio_code_mask=clip), "'audio_codes_mask'"),
        (lambda: audio(audio_codes=clip, attention_mask=clip), "'attention_mask'"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    start = image.start_tokens(y, 3)
    for given in ({"image_codes": x}, {"class_labels": y}, {"labels": start}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} would do nothing"):
            image(start, **given)
