"""Codes as two tokens each: ids and back, order, saving, generation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from modeling_simvq import CodeLogitsProcessor, CodeVocabulary, add_code_tokens
from tests.modeling_simvq.test_code_tokens import byte_pair_tokenizer, llama


@pytest.fixture(scope="module")
def extended():
    tokenizer = byte_pair_tokenizer()
    model = llama(len(tokenizer))
    return tokenizer, model, add_code_tokens(tokenizer, model, 12, factors=(3, 4))


def test_a_code_is_two_tokens_that_tell_themselves_apart(extended, tmp_path):
    tokenizer, model, vocabulary = extended
    count = len(byte_pair_tokenizer())
    assert vocabulary == CodeVocabulary("image", count, count + 1, count + 2, 12, (3, 4))
    assert len(model.get_input_embeddings().weight) == len(tokenizer) == count + 2 + 7
    ids = vocabulary.to_ids(torch.tensor([[0, 11, 6]]))
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == [
        "<|image_start|>",
        *("<|image_first_0|>", "<|image_second_0|>"),
        *("<|image_first_2|>", "<|image_second_3|>"),
        *("<|image_first_1|>", "<|image_second_2|>"),
        "<|image_end|>",
    ]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert CodeVocabulary.from_tokenizer(again) == vocabulary
    (text,) = vocabulary.to_text(torch.tensor([[0, 11, 6]]))
    assert again(text, return_tensors="pt")["input_ids"].tolist() == ids.tolist()


@settings(deadline=None)
@given(st.data())
def test_any_codes_come_back(data):
    first, second = data.draw(st.integers(1, 600)), data.draw(st.integers(1, 600))
    vocabulary = CodeVocabulary("sound", 5, 6, 10, first * second, (first, second))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(first * second, shape, generator=torch.Generator().manual_seed(seed))
    ids = vocabulary.to_ids(codes)
    assert ids.shape == (shape[0], 2 + 2 * shape[1] * shape[2])
    text = torch.full((shape[0], data.draw(st.integers(0, 3))), 7)
    among = torch.cat([text, ids, text, ids.flip(0)], dim=1)
    assert torch.equal(vocabulary.to_codes(among, shape[1:])[::2], codes)
    assert torch.equal(torch.stack(vocabulary.to_codes(ids)), codes.flatten(1))
    marked = vocabulary.mask(among)
    assert marked.sum() == 2 * ids.numel() and not marked[:, : text.shape[1]].any()


def test_factors_out_of_turn_are_named():
    vocabulary = CodeVocabulary("image", 10, 11, 12, 12, (3, 4))
    first, second = 12, 15
    for ids, fault in {
        (10, second, first, 11): f"id {second} in row 0 at position 1 is a factor out of turn",
        (7, 10, first, first, 11): f"id {first} in row 0 at position 3 is a factor out of turn",
        (10, first, second, first, 11): "row 0 at position 4 stands between the two factors",
        (10, first, second, first): "truncated",
        (first, second): "is a code outside",
        (10, first, 19, 11): "id 19 in row 0 at position 2 is no code",
    }.items():
        with pytest.raises(ValueError, match=fault):
            vocabulary.to_codes(torch.tensor(ids))
    good = torch.tensor([10, first, second, 11])
    with pytest.raises(ValueError, match=r"has 1 codes, of the shape \(2, 2\) are 4"):
        vocabulary.to_codes(good, (2, 2))
    # The place within an image counts, not that in the row.
    rows = torch.tensor([[7, 10, first, second, 11, 10, first + 2, second + 3, 11]])
    assert vocabulary.to_codes(rows, (1,)).tolist() == [[0], [11]]


@pytest.mark.parametrize("factors", [(3, 5), (12,), (0, 12), (-3, -4), (2.0, 6), "ab", 12])
def test_factors_must_make_the_codebook(factors):
    tokenizer = byte_pair_tokenizer()
    model, count = llama(len(tokenizer)), len(tokenizer)
    with pytest.raises(ValueError, match="two numbers whose product is 12"):
        add_code_tokens(tokenizer, model, 12, factors=factors)
    assert len(tokenizer) == count == len(model.get_input_embeddings().weight)


def test_a_tokenizer_without_the_second_factors_is_refused():
    tokenizer = byte_pair_tokenizer()
    tokenizer.add_tokens(["<|image_start|>", "<|image_end|>", "<|image_first_0|>"])
    with pytest.raises(ValueError, match=r"<\|image_second_0\|> should have the id"):
        CodeVocabulary.from_tokenizer(tokenizer)


def test_only_the_factor_whose_turn_it_is_is_allowed():
    vocabulary = CodeVocabulary("image", 10, 11, 12, 6, (2, 3))
    history = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 10], [1, 2, 10, 12], [1, 10, 13, 16]])
    scores = torch.zeros(4, 20)
    text = [token for token in range(20) if token not in range(11, 17)]

    def allowed(length):
        found = CodeLogitsProcessor(vocabulary, length)(history, scores).isfinite()
        return [row.nonzero().flatten().tolist() for row in found]

    assert allowed(None) == [text, [11, 12, 13], [14, 15, 16], [11, 12, 13]]
    assert allowed(1) == [text, [12, 13], [14, 15, 16], [11]]
    assert allowed(2) == [text, [12, 13], [14, 15, 16], [12, 13]]


def test_whatever_is_sampled_is_whole(extended):
    tokenizer, model, vocabulary = extended
    torch.manual_seed(0)
    made = model.eval().generate(
        **tokenizer("a cat<|image_start|>", return_tensors="pt"),
        max_new_tokens=2 * 6 + 1,
        do_sample=True,
        temperature=50.0,
        top_k=0,
        eos_token_id=vocabulary.end,
        num_return_sequences=5,
        logits_processor=[CodeLogitsProcessor(vocabulary, length=6)],
    )
    assert vocabulary.to_codes(made, (2, 3)).shape == (5, 2, 3)


def test_similar_codes_share_their_first_token(tiny_model):
    """As the docs say: codes numbered by order_by_similarity."""
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    (snippet,) = [part for part in page.split("```")[1::2] if "order_by_similarity" in part]
    names = {"model": tiny_model}
    exec(snippet.removeprefix("python\n").replace("512", "8"), names)
    number, order = names["number"], names["order"]
    vocabulary = CodeVocabulary("image", 0, 1, 2, 64, (8, 8))
    codes = torch.randperm(64)[None]
    ids = vocabulary.to_ids(number[codes])
    assert torch.equal(order[vocabulary.to_codes(ids, (64,))], codes)
    codebook = tiny_model.quantizer.codebook()
    cells = codebook[order].unflatten(0, (8, 8))  # codes of each first token
    assert cells.var(dim=1).sum() < 0.8 * 8 * codebook.var(dim=0).sum()
