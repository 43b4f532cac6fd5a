"""Code models with several codes a position: the delay pattern, what sees what, and sampling. Tiny models."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from modeling_simvq.delayed_codes import NO_CODE, KnownCodes, delay, undelay
from modeling_simvq.modeling_simvq_generation import SimVQForAudioGeneration
from tests.modeling_simvq.test_generation import audio_model, codes_of, image_model

LEVELS = 3
WAYS = [
    {"code_factors": None, "tie_word_embeddings": False},
    {"code_factors": (4, 8), "tie_word_embeddings": True},
]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_undelay_is_the_inverse_of_delay(batch, levels, length, before):
    codes = codes_of(batch, levels, length)
    delayed = delay(codes)
    assert torch.equal(undelay(delayed), codes)
    assert delayed.shape == (batch, levels, length + levels - 1)
    # Each code once, and nothing else.
    assert (delayed != NO_CODE).sum() == codes.numel()
    steps = F.pad(delayed, (before, 0), value=NO_CODE)
    assert torch.equal(undelay(steps, torch.full((batch,), before), length), codes)


def test_padding_is_no_code():
    codes = codes_of(2, LEVELS, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    delayed = delay(codes, mask)
    assert torch.equal(delayed[:1, :, :4], delay(codes[:1, :, :2]))
    assert (delayed[0, :, 4:] == NO_CODE).all()
    assert torch.equal(delayed[1:], delay(codes[1:]))


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_levels_and_what_each_code_sees(way, tmp_path):
    model = image_model(num_quantizers=LEVELS, **way)
    codes, labels = codes_of(4, LEVELS, 3, 4), torch.tensor([0, 1, 2, 0])
    output = model(image_codes=codes, class_labels=labels, return_logits=True)
    assert output.logits.shape == (4, LEVELS, 12, 32)
    for level in range(LEVELS):
        expected = F.cross_entropy(output.logits[:, level].flatten(0, 1), codes[:, level].flatten())
        torch.testing.assert_close(output.level_losses[level], expected)
    torch.testing.assert_close(output.loss, output.level_losses.mean())
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A code is seen by those of later steps, t + q, and by no others.
    step = torch.arange(12) + torch.arange(LEVELS)[:, None]
    with torch.no_grad():
        for level, place in ((0, 5), (1, 0), (2, 5), (2, 11)):
            changed = codes.flatten(2).clone()
            changed[:, level, place] = (changed[:, level, place] + 1) % 32
            again = model(image_codes=changed, class_labels=labels, return_logits=True).logits
            differs = ((again - output.logits).abs().amax(dim=(0, 3)) > 1e-6).flatten()
            assert torch.equal(differs, (step > level + place).flatten())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(image_codes=codes, class_labels=labels).loss, output.loss)


def predicted(model, codes: torch.Tensor, **given) -> torch.Tensor:
    """Return the likeliest code at each place, as training sees it."""
    with torch.no_grad():
        return model(**given, return_logits=True).logits.argmax(dim=-1).reshape(codes.shape)


@pytest.mark.parametrize("way", WAYS)
def test_images_are_sampled_as_they_are_learnt(way):
    """What ``generate`` samples where a level has no code leaves no trace."""
    model, labels = image_model(num_quantizers=LEVELS, **way), torch.tensor([0, 1])
    made = model.generate_images(labels, num_images=2, do_sample=False)
    assert made.shape == (4, LEVELS, 3, 4) and made.dtype == torch.int64
    assert torch.equal(made[::2], made[1::2])
    given = {"image_codes": made, "class_labels": labels.repeat_interleave(2)}
    assert torch.equal(made, predicted(model, made, **given))
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({"use_cache": False}, static):
        assert torch.equal(made, model.generate_images(labels, 2, do_sample=False, **options))
    guided = [
        model.generate_images(labels, guidance_scale=3.0, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*guided)
    sampled = [
        model.generate_images(
            labels,
            temperature=0.9,
            top_k=20,
            top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize("lengths", [(7, 7), (6, 1, 3)])
def test_prompts_go_on_as_they_are_learnt(lengths):
    model = audio_model(num_quantizers=LEVELS)
    prompts, longest = codes_of(len(lengths), LEVELS, max(lengths)), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None, None]
    made = model.generate_audio(5, prompts, mask, num_clips=2, do_sample=False)
    assert made.audio_codes.shape == (2 * len(lengths), LEVELS, longest + 5)
    for row, length in enumerate(lengths):
        codes = made.audio_codes[2 * row : 2 * row + 1, :, : length + 5]
        assert torch.equal(codes[0, :, :length], prompts[row, :, :length])
        found = predicted(model, codes, audio_codes=codes)
        assert torch.equal(found[..., length:], codes[..., length:])
        assert made.audio_codes_mask[2 * row].sum() == length + 5
        alone = model.generate_audio(5, prompts[row : row + 1, :, :length], do_sample=False)
        assert torch.equal(alone.audio_codes, codes)
    again = model.generate_audio(
        5, prompts, mask, num_clips=2, do_sample=False, use_cache=False
    ).audio_codes
    assert torch.equal(again, made.audio_codes)


def test_audio_from_nothing_and_padding_in_training():
    model = audio_model(num_quantizers=LEVELS)
    made = model.generate_audio(30, num_clips=2, generator=torch.Generator().manual_seed(0))
    assert made.audio_codes.shape == (2, LEVELS, 30) and made.audio_codes_mask.all()
    codes = codes_of(2, LEVELS, 9)
    mask = torch.arange(9) < torch.tensor([4, 9])[:, None, None]
    with torch.no_grad():
        losses = model(audio_codes=codes, audio_codes_mask=mask).level_losses
        short, whole = (
            model(audio_codes=one).level_losses for one in (codes[:1, :, :4], codes[1:])
        )
    torch.testing.assert_close(losses, (4 * short + 9 * whole) / 13)
    codes[0, :, 4:] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            model(audio_codes=codes, audio_codes_mask=mask).level_losses, losses
        )


def test_known_codes_are_the_only_ones():
    processor = KnownCodes(torch.tensor([[3, NO_CODE]]), begin=4)
    scores = torch.randn(1, 6)
    taken = processor(torch.zeros(1, 4).long(), scores)
    assert taken.softmax(-1).argmax() == 3 and taken.isfinite().sum() == 1
    assert torch.equal(processor(torch.zeros(1, 5).long(), scores), scores)
    assert torch.equal(processor(torch.zeros(1, 6).long(), scores), scores)


def test_what_does_not_fit_is_named():
    model = image_model(num_quantizers=LEVELS)
    with pytest.raises(ValueError, match="num_beams = 2 does not go with 3 codes a position"):
        model.generate_images(num_beams=2)
    with pytest.raises(
        ValueError, match=r"must be \(B, 3, 3, 4\) or \(B, 3, 12\), got .*\(2, 3, 4\)"
    ):
        model(image_codes=codes_of(2, 3, 4))
    sound = audio_model(num_quantizers=LEVELS)
    with pytest.raises(ValueError, match=r"audio_codes must be \(B, 3, T\)"):
        sound(audio_codes=codes_of(2, 1, 4))
    with pytest.raises(ValueError, match="arrange_codes takes 3 codebooks"):
        sound.arrange_codes([torch.randn(32, 4)])


def test_one_code_a_position_is_as_before():
    """The names of the weights are those of models saved before there were several."""
    names = set(audio_model().state_dict())
    assert {"model.embed_tokens.table.weight", "model.embed_tokens.head.weight"} <= names
    assert isinstance(audio_model(), SimVQForAudioGeneration)
    assert audio_model().config.longest_sequence == 31
