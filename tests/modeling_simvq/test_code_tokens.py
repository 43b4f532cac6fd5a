"""Codes in the vocabulary of a language model: ids and back, new rows, saving, training, generation."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from modeling_simvq import CodeLogitsProcessor, CodeVocabulary, add_code_tokens

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "num_key_value_heads": 2}


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["an image of a cat", "an image of a dog"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def llama(rows: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SMALL))


def models_of(rows: int) -> dict:
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=rows, n_embd=32, n_layer=1, n_head=2)
    return {
        "untied": llama(rows),
        "tied": Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=True, **SMALL)),
        "tied, gpt2": GPT2LMHeadModel(gpt2),
        "with a bias": PhiForCausalLM(PhiConfig(vocab_size=rows, **SMALL)),
    }


@pytest.fixture
def extended():
    tokenizer = byte_pair_tokenizer()
    model = llama(len(tokenizer))
    return tokenizer, model, add_code_tokens(tokenizer, model, 16)


def test_codes_to_ids_and_back_among_text(extended):
    tokenizer, _, vocabulary = extended
    codes = torch.randint(16, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    ids = vocabulary.to_ids(codes)
    assert ids.shape == (3, 10) and ids.dtype == torch.int64
    assert tokenizer.convert_ids_to_tokens(ids[0, :2].tolist()) == [
        "<|image_start|>",
        f"<|image_code_{codes[0, 0, 0]}|>",
    ]
    torch.testing.assert_close(vocabulary.to_codes(ids, (2, 4)), codes)
    # A batch of texts with two images in a row of one, and none in another.
    first, second, third = vocabulary.to_text(codes)
    texts = [f"a cat {first} and a dog{second}", "a cat", f"{third}"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(vocabulary.to_codes(batch, (2, 4)), codes)
    assert tokenizer.decode(batch[0][~vocabulary.mask(batch[0])]) == "a cat  and a dog"
    assert tokenizer.decode(batch[0], skip_special_tokens=True) == "a cat  and a dog"
    # Of different lengths, as sounds are.
    line = torch.cat([vocabulary.to_ids(codes[:1, 0])[0], vocabulary.to_ids(codes[1:2])[0]])
    assert [len(found) for found in vocabulary.to_codes(line)] == [4, 8]
    assert vocabulary.to_codes(batch[1:2], (2, 4)).shape == (0, 2, 4)
    assert vocabulary.to_codes(batch[0, :0]) == []


def test_what_is_amiss_is_named(extended):
    _, _, vocabulary = extended
    good = vocabulary.to_ids(torch.zeros(1, 4, dtype=torch.long))[0]
    start, end, code, text = vocabulary.start, vocabulary.end, vocabulary.offset, 7
    for ids, fault in {
        (text, start, code, code): "row 0 at position 1 is truncated: 2 codes and no <|image_end|>",
        (start, code, start, code, end): "row 0 at position 2 begins before the one before",
        (code, end): "row 0 at position 1 <|image_end|> without a start",
        (start, code, text, end): f"id {text} in row 0 at position 2 is no code",
        (text, code): f"id {code} in row 0 at position 1 is a code outside",
    }.items():
        with pytest.raises(ValueError, match=fault.replace("|", r"\|")):
            vocabulary.to_codes(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"row 0 at position 0 has 4 codes, of the shape \(3, 3\)"):
        vocabulary.to_codes(good, (3, 3))
    for codes, fault in (
        (torch.tensor([[3, 16]]), r"\[0, 16\), got 16"),
        (torch.tensor([[-1, 0]]), "got -1"),
        (torch.zeros(1, 4), "integers"),
        (torch.zeros(4, dtype=torch.long), "integers"),
    ):
        with pytest.raises(ValueError, match=fault):
            vocabulary.to_ids(codes)


def test_tokens_that_cannot_be_added_leave_the_model_alone():
    tokenizer = byte_pair_tokenizer()
    model, count = llama(len(tokenizer)), len(tokenizer)
    for arguments, fault in (
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"codebook_size": 4, "name": "Bad name"}, "'Bad name'"),
    ):
        with pytest.raises(ValueError, match=fault):
            add_code_tokens(tokenizer, model, **arguments)
    with pytest.raises(ValueError, match="the model only 20 rows"):
        add_code_tokens(tokenizer, llama(20), 4)
    with pytest.raises(ValueError, match=r"no <\|sound_start\|>.*name='sound'"):
        CodeVocabulary.from_tokenizer(tokenizer, "sound")
    assert len(tokenizer) == count
    tokenizer.add_tokens(["<|image_code_2|>"])
    with pytest.raises(ValueError, match=rf"already has <\|image_code_2\|> \(id {count}\)"):
        add_code_tokens(tokenizer, model, 4)
    # A token that swallows the beginning of ours, and ids that leave gaps for ours to fall into.
    tokenizer.add_tokens([AddedToken("<|sound_start|><|sound_code", normalized=False)])
    with pytest.raises(ValueError, match="overlap"):
        add_code_tokens(tokenizer, llama(len(tokenizer)), 4, "sound")
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 9, "?": 3}, unk_token="?"))
    gaps.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="overlap|must follow"):
        add_code_tokens(PreTrainedTokenizerFast(tokenizer_object=gaps), llama(10), 16)
    assert len(model.get_input_embeddings().weight) == count


@pytest.mark.parametrize("kind", ["untied", "tied", "tied, gpt2", "with a bias"])
@pytest.mark.parametrize("spare", [0, 40])  # rows that the model already has beyond the tokenizer
def test_new_rows_are_the_mean_with_a_little_spread(kind, spare):
    tokenizer = byte_pair_tokenizer()
    count, size = len(tokenizer), 500
    model = models_of(count + spare)[kind].eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(32) * 0.1)
        model.get_input_embeddings().weight[count:] = 1e6  # spare rows hold anything
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    prompt = torch.arange(20)[None]
    before = model(prompt).logits[..., :count]
    old = [table.weight[:count].clone() for table in _tables(model)]
    vocabulary = add_code_tokens(tokenizer, model, size, pad_to_multiple_of=64)
    rows = model.config.vocab_size
    assert rows % 64 == 0 and rows - 64 < max(count + size + 2, count + spare) <= rows
    assert vocabulary == CodeVocabulary("image", count, count + 1, count + 2, size)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == kind.startswith("tied")
    for table, weight in zip(_tables(model), old, strict=True):
        assert table.weight.shape[0] == rows
        torch.testing.assert_close(table.weight[:count], weight, rtol=0, atol=0)
        new, deviation = table.weight[count:], weight.std(0)
        assert ((new.mean(0) - weight.mean(0)).abs() < 0.03 * deviation).all()
        assert 0.08 < float((new.std(0).mean() / deviation.mean()).detach()) < 0.12
        assert len(torch.unique(new.bfloat16().float(), dim=0)) == len(new)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        assert (bias[count:] == bias[:count].mean()).all()
    after = model(prompt).logits
    assert after.shape[-1] == rows
    torch.testing.assert_close(after[..., :count], before, rtol=1e-4, atol=1e-5)


def _tables(model) -> list:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


@pytest.mark.parametrize("in_python", [False, True])
def test_saved_and_loaded_with_two_vocabularies(in_python, tmp_path):
    tokenizer = ByT5Tokenizer() if in_python else byte_pair_tokenizer()
    model = llama(len(tokenizer))
    image = add_code_tokens(tokenizer, model, 32)
    sound = add_code_tokens(tokenizer, model, 8, "sound")
    assert sound.start == image.offset + 32
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert CodeVocabulary.from_tokenizer(again) == image
    assert CodeVocabulary.from_tokenizer(again, "sound") == sound
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    codes = torch.arange(8).reshape(1, 1, 8)
    text = f"a cat {image.to_text(codes)[0]} and {sound.to_text(codes)[0]}"
    ids = again(text, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizer(text, return_tensors="pt")["input_ids"])
    assert torch.equal(image.to_codes(ids[:, : ids.shape[1] - 12], (1, 8)), codes)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_trained_on_text_with_pictures_it_makes_pictures(tied):
    tokenizer = byte_pair_tokenizer()
    model = llama(len(tokenizer), tied)
    vocabulary = add_code_tokens(tokenizer, model, 64)
    codes = torch.stack([torch.arange(9), torch.arange(9) + 40]).reshape(2, 3, 3)
    cat, dog = vocabulary.to_text(codes)
    texts = [f"an image of a cat{cat}", f"an image of a dog{dog}"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(100):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[3] < losses[0] and losses[-1] < 0.2 * losses[0]
    tokenizer.padding_side = "left"
    prompts = tokenizer(
        ["an image of a dog<|image_start|>", "image of a cat<|image_start|>"],
        padding=True,
        return_tensors="pt",
    )
    processor = CodeLogitsProcessor(vocabulary, length=9)
    model.eval()
    made = model.generate(
        **prompts, max_new_tokens=10, do_sample=False, logits_processor=[processor]
    )
    torch.testing.assert_close(vocabulary.to_codes(made, (3, 3)), codes.flip(0))
    # Whatever it samples, at any temperature, images are whole and made of codes.
    made = model.generate(
        **prompts,
        max_new_tokens=60,
        do_sample=True,
        temperature=50.0,
        top_k=0,
        eos_token_id=vocabulary.end + 1000,
        logits_processor=[processor],
    )
    complete = made[:, : int((made == vocabulary.end).nonzero()[:, 1].min()) + 1]
    assert vocabulary.to_codes(complete[:1], (3, 3)).shape == (1, 3, 3)


def test_the_model_may_end_what_has_no_fixed_length():
    vocabulary = CodeVocabulary("sound", 10, 11, 12, 4)
    scores = torch.zeros(3, 20)
    history = torch.tensor([[1, 2, 3], [1, 10, 13], [10, 12, 11]])
    allowed = CodeLogitsProcessor(vocabulary)(history, scores).isfinite()
    text = [token for token in range(20) if token not in range(11, 16)]
    assert [row.nonzero().flatten().tolist() for row in allowed] == [
        text,
        [11, 12, 13, 14, 15],
        text,
    ]
    fixed = CodeLogitsProcessor(vocabulary, 1)(history, scores).isfinite()
    assert fixed[1].nonzero().flatten().tolist() == [11]


def test_the_snippet_of_the_docs_runs(tiny_model, tmp_path, monkeypatch):
    tokenizer = byte_pair_tokenizer()
    llama(len(tokenizer)).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    snippet = page.split("## In a language model")[1].split("```python\n")[1].split("```")[0]
    assert "Qwen/Qwen3-0.6B" in snippet
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny_model, "codes": torch.arange(20).reshape(1, 4, 5)}
    exec(snippet.replace("Qwen/Qwen3-0.6B", "language"), names)
    assert names["pixels"].shape == (1, 3, 8, 10) and names["loss"] > 0
    assert names["vocabulary"].codebook_size == 64
