"""Codes of several quantizers in the vocabulary of a language model: order, ids and back, whole sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_simvq import CodeLogitsProcessor, CodeVocabulary, add_code_tokens
from tests.modeling_simvq.test_code_tokens import byte_pair_tokenizer, llama
from tests.modeling_simvq.test_generation import codes_of

SPARE = 5  # ids of text before those of codes


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_ids_and_back(batch, levels, height, width):
    vocabulary = CodeVocabulary("image", 3, 4, SPARE, 32, num_quantizers=levels)
    several = (levels,) if levels > 1 else ()
    codes = codes_of(batch, *several, height, width)
    ids = vocabulary.to_ids(codes)
    assert ids.shape == (batch, levels * height * width + 2)
    assert torch.equal(vocabulary.to_codes(ids, (*several, height, width)), codes)
    for one, expected in zip(vocabulary.to_codes(ids), codes.flatten(-2), strict=True):
        assert torch.equal(one, expected)
    # Position by position, each quantizer's codes in a range of its own.
    first = (ids[:, 1:-1] - SPARE).unflatten(1, (-1, levels))[:, 0]
    expected = codes.reshape(batch, levels, -1)[..., 0] + 32 * torch.arange(levels)
    assert torch.equal(first, expected)


@pytest.fixture(scope="module")
def extended():
    tokenizer = byte_pair_tokenizer()
    model = llama(len(tokenizer))
    return tokenizer, model, add_code_tokens(tokenizer, model, 16, num_quantizers=3)


def test_tokens_are_found_again_and_read(extended):
    tokenizer, model, vocabulary = extended
    assert vocabulary.code_tokens == 48 and vocabulary.tokens_per_code == 3
    assert vocabulary.offset + 48 == len(model.get_input_embeddings().weight)
    assert CodeVocabulary.from_tokenizer(tokenizer) == vocabulary
    codes = codes_of(1, 3, 2) % 16
    (text,) = vocabulary.to_text(codes)
    assert text.startswith(f"<|image_start|><|image_level1_{codes[0, 0, 0]}|><|image_level2_")
    ids = torch.tensor(tokenizer(f"a cat {text}")["input_ids"])
    assert torch.equal(vocabulary.to_codes(ids, (3, 2)), codes)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a cat"
    with pytest.raises(ValueError, match="already has <|image_level1_0|>"):
        add_code_tokens(tokenizer, model, 16, num_quantizers=3)


def test_positions_stay_whole(extended):
    """The processor lets each quantizer's codes come in their turn, and the end only after whole positions."""
    _, model, vocabulary = extended
    for length in (2, None):
        made = model.generate(
            torch.tensor([[0, vocabulary.start]]).repeat(4, 1),
            max_new_tokens=7,
            do_sample=True,
            logits_processor=[CodeLogitsProcessor(vocabulary, length)],
            eos_token_id=None,
        )
        if length:
            assert vocabulary.to_codes(made, (3, 2)).shape == (4, 3, 2)
        else:
            kinds = (made[:, 2:] - vocabulary.offset) // 16
            for row, ids in zip(kinds.tolist(), made[:, 2:].tolist(), strict=True):
                inside = ids.index(vocabulary.end) if vocabulary.end in ids else len(ids)
                assert row[:inside] == [n % 3 for n in range(inside)]


def test_what_is_amiss_is_named(extended):
    tokenizer, model, vocabulary = extended
    ids = vocabulary.to_ids(codes_of(1, 3, 2) % 16)
    swapped = ids[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    for broken, message in (
        (swapped, "position 1 is a code of a quantizer out of turn"),
        (ids[:, [0, 1, 2, 7]], "stands between the codes of a position"),
        (ids[:, :5], "truncated: 1 codes"),
    ):
        with pytest.raises(ValueError, match=message):
            vocabulary.to_codes(broken)
    with pytest.raises(ValueError, match="shape must begin with 3"):
        vocabulary.to_codes(ids, (6,))
    with pytest.raises(ValueError, match=r"must be integers \(B, 3, ...\), got shape \(1, 6\)"):
        vocabulary.to_ids(ids[:, 1:-1])
    with pytest.raises(ValueError, match="num_quantizers must be at least 1, and 1 with factors"):
        add_code_tokens(tokenizer, model, 16, name="b", factors=(4, 4), num_quantizers=2)
