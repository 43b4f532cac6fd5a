"""Code tokens trained by PEFT: LoRA on attention, new rows alone of the tables; saved, loaded, merged."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_simvq import CodeLogitsProcessor, CodeVocabulary, add_code_tokens
from tests.modeling_simvq.test_code_tokens import byte_pair_tokenizer, llama

peft = pytest.importorskip("peft")


def adapted(language, vocabulary: CodeVocabulary, tied: bool):
    """Return the model with the adapter of the docs."""
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    (snippet,) = [part for part in page.split("```")[1::2] if "from peft" in part]
    if tied:
        assert ', "lm_head": rows' in snippet
        snippet = snippet.replace(', "lm_head": rows', "")
    names = {"language": language, "vocabulary": vocabulary}
    exec(snippet.removeprefix("python\n"), names)
    return names["adapted"]


@pytest.mark.slow
@pytest.mark.parametrize("factors", [None, (4, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_saved_loaded_and_merged(tied, factors, tmp_path):
    tokenizer = byte_pair_tokenizer()
    count = len(tokenizer)
    language = llama(count, tied)
    vocabulary = add_code_tokens(tokenizer, language, 16, factors=factors)
    language.save_pretrained(tmp_path / "extended")
    tokenizer.save_pretrained(tmp_path / "extended")
    tables = [language.get_input_embeddings(), language.get_output_embeddings()]
    before = [table.weight.detach().clone() for table in tables]

    codes = torch.arange(4)[None] * 5
    batch = tokenizer([f"an image of a cat{vocabulary.to_text(codes)[0]}"], return_tensors="pt")
    model = adapted(language, vocabulary, tied)
    learnt = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "trainable_tokens" in name for name in learnt)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    losses = []
    for _ in range(60):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    trained = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, trained, rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, trained, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    final = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(final(**batch).logits, trained, rtol=0, atol=1e-5)
    first = min(vocabulary.start, vocabulary.end)
    for table, old in zip(
        (final.get_input_embeddings(), final.get_output_embeddings()), before, strict=True
    ):
        assert torch.equal(table.weight[:first], old[:first])
        assert not torch.equal(table.weight[first:], old[first:])
    # It needs nothing of PEFT, and its images are whole.
    found = CodeVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert found == vocabulary
    prompt = tokenizer("an image of a cat<|image_start|>", return_tensors="pt")
    made = final.generate(
        **prompt,
        max_new_tokens=4 * found.tokens_per_code + 1,
        do_sample=False,
        logits_processor=[CodeLogitsProcessor(found, length=4)],
    )
    assert torch.equal(found.to_codes(made, (4,)), codes)
