"""Code models as plain Llamas: equal logits, samples, tokens, what engines read; and as GGUF files."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_simvq import CodeVocabulary, export_generator, export_gguf
from modeling_simvq.export_generator import plain_llama
from tests.modeling_simvq.test_generation import audio_model, image_model


def varied(model, seed: int = 0):
    """Give every weight of a model another value, norms too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            weight += weight.ndim == 1
    return model.eval()


def sequences(model, length: int) -> torch.Tensor:
    """One sequence for each token that it may begin with."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    starts = config.codebook_size + torch.arange(config.num_start_tokens)[:, None]
    codes = torch.randint(config.codebook_size, (len(starts), length), generator=generator)
    return torch.cat([starts, codes], dim=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [image_model, audio_model])
def test_logits_of_codes_are_equal_and_others_forbidden(make, tied, tmp_path):
    model = varied(make(tie_word_embeddings=tied, rope_theta=500.0))
    assert export_generator(model, tmp_path / "a" / "b", tokenizer_name="me/tokenizer")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b")
    assert type(llama) is LlamaForCausalLM and llama.config.simvq_tokenizer == "me/tokenizer"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    tokens = sequences(model, 12)
    with torch.no_grad():
        ours = model.step(tokens, logits_to_keep=0).logits
        theirs = llama(tokens).logits
    size = model.config.codebook_size
    torch.testing.assert_close(theirs[..., :size], ours, rtol=0, atol=1e-5)
    assert theirs[..., size:].shape[-1] == model.config.num_start_tokens + 1
    assert (theirs[..., size:] < -1000).all()
    # So they have the same distribution, in which nothing but codes is ever drawn.
    torch.testing.assert_close(theirs.softmax(-1)[..., :size], ours.softmax(-1))


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_logits_are_equal_at_any_size(data):
    heads = data.draw(st.sampled_from([1, 2, 4]))
    model = varied(
        audio_model(
            codebook_size=data.draw(st.integers(1, 50)),
            hidden_size=2 * heads * data.draw(st.integers(1, 40)),
            num_attention_heads=heads,
            num_key_value_heads=data.draw(st.sampled_from([1, heads])),
            rms_norm_eps=10.0 ** data.draw(st.integers(-12, 0)),
            tie_word_embeddings=data.draw(st.booleans()),
        ),
        seed=data.draw(st.integers(0, 2**31)),
    )
    tokens = sequences(model, 5)
    with torch.no_grad():
        ours, theirs = (
            model.step(tokens, logits_to_keep=0).logits,
            plain_llama(model)(tokens).logits,
        )
    size = model.config.codebook_size
    torch.testing.assert_close(theirs[..., :size], ours, rtol=1e-5, atol=1e-5)
    assert (theirs[..., size:] < -1000).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_nothing_but_codes_comes(dtype):
    model = varied(image_model(hidden_size=128)).to(dtype)
    llama = plain_llama(model)
    assert {weight.dtype for weight in llama.state_dict().values()} == {dtype}
    tokens = sequences(model, 12)
    with torch.no_grad():
        ours, theirs = model.step(tokens, logits_to_keep=0).logits, llama(tokens).logits
    assert theirs.float().softmax(-1)[..., 32:].max() == 0
    torch.testing.assert_close(theirs[..., :32].float(), ours.float(), rtol=0.1, atol=0.1)


def test_images_of_llama_are_ours_and_decode(tiny_model, tmp_path):
    model = varied(image_model(codebook_size=64, num_classes=3))
    export_generator(model, tmp_path)
    llama, tokenizer = (
        LlamaForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    prompts = tokenizer(["<|image_class_2|>", "<|image_start|>"], return_tensors="pt")
    labels = torch.tensor([2, model.config.null_class])
    # The folder's own settings make one whole image.
    made = llama.generate(**prompts, do_sample=False)
    codes = made[:, 1:].unflatten(1, (3, 4))
    assert torch.equal(codes, model.generate_images(labels, do_sample=False))
    assert tiny_model.decode(image_codes=codes).pixel_values.shape == (2, 3, 6, 8)
    guided = llama.generate(
        **prompts,
        do_sample=False,
        guidance_scale=3.0,
        negative_prompt_ids=tokenizer(["<|image_start|>"] * 2, return_tensors="pt")["input_ids"],
    )
    wanted = model.generate_images(labels, do_sample=False, guidance_scale=3.0)
    assert torch.equal(guided[:, 1:].unflatten(1, (3, 4)), wanted)
    sampled = llama.generate(**prompts)[:, 1:]
    assert sampled.shape == (2, 12) and sampled.max() < 64
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["grid_size"] == [3, 4] and config["id2label"]["2"] == "LABEL_2"
    assert config["model_type"] == "llama" and "auto_map" not in config


def test_audio_of_llama_decodes(tiny_audio_model, tmp_path):
    model = varied(audio_model(codebook_size=64))
    export_generator(model, tmp_path)
    llama, tokenizer = (
        LlamaForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    vocabulary = CodeVocabulary.from_tokenizer(tokenizer, "audio")
    assert vocabulary == CodeVocabulary("audio", 64, 65, 0, 64)
    spoken = torch.tensor([[[5, 6, 7]]])
    prompt = vocabulary.to_ids(spoken)[:, :-1]  # still open
    made = llama.generate(prompt, max_new_tokens=9, do_sample=False)
    ours = model.generate_audio(9, spoken, do_sample=False).audio_codes
    assert torch.equal(made[:, 1:], ours[:, 0])
    whole = torch.cat([made, torch.tensor([[vocabulary.end]])], dim=1)
    codes = vocabulary.to_codes(whole, (1, 12))
    assert tiny_audio_model.decode(codes).audio_values.shape == (1, 1, 12 * 320)


def test_the_tokenizer_reads_what_it_writes(tmp_path):
    model = image_model(num_classes=12)
    export_generator(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 32 + 12 + 2 == tokenizer.eos_token_id + 1
    ids = torch.randperm(len(tokenizer)).tolist()
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids and " " not in text
    assert tokenizer.convert_tokens_to_ids(["<|image_code_31|>", "<|image_class_11|>"]) == [31, 43]
    assert tokenizer.decode([44, 3, 4, 45], skip_special_tokens=True) == tokenizer.decode([3, 4])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|image_start|>", "<|image_end|>")
    vocabulary = CodeVocabulary.from_tokenizer(tokenizer)
    codes = torch.randint(32, (2, 3, 4))
    read = tokenizer(vocabulary.to_text(codes), return_tensors="pt")["input_ids"]
    assert torch.equal(vocabulary.to_codes(read, (3, 4)), codes)
    with pytest.raises(Exception, match="UNK"):
        tokenizer("<|image_start|>a cat")
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == ids


def test_images_without_classes_begin_with_the_start(tmp_path):
    export_generator(image_model(num_classes=0), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("<|image_start|>")["input_ids"] == [32] == [tokenizer.bos_token_id]
    made = LlamaForCausalLM.from_pretrained(tmp_path).generate()  # from the start token by itself
    assert made.shape == (1, 13) and made[0, 0] == 32 and made[0, 1:].max() < 32


@pytest.mark.parametrize("export", [export_generator, export_gguf])
def test_what_cannot_be_exported_is_refused(export, tiny_model, tmp_path):
    if export is export_gguf:
        pytest.importorskip("gguf")
    output = tmp_path / "out"
    for model, fault in (
        (tiny_model, "a SimVQImageModel is no code model: SimVQForImageGeneration and"),
        (image_model(code_factors=(4, 8)), r"\[4, 8\] predicts .* train with code_factors=None"),
        (image_model(rms_norm_eps=0.0), "rms_norm_eps = 0 is too small in torch.float32"),
        (
            image_model(rms_norm_eps=1e-13).half(),
            "rms_norm_eps = 1e-13 is too small in torch.float16",
        ),
    ):
        with pytest.raises(ValueError, match=fault):
            export(model, output)
    assert not list(tmp_path.iterdir())
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is there already and not an empty folder"):
        export(image_model(), output)
    with pytest.raises(ValueError, match=r"notes.txt is there already"):
        export(image_model(), output / "notes.txt")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_offloaded_weights_are_refused(tmp_path):
    from accelerate import cpu_offload

    model = image_model()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        export_generator(model, tmp_path / "out")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        export_generator(image_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def fields_of(path: Path) -> dict:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_holds_the_model_and_its_tokens(dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = varied(image_model())
    path = export_gguf(model, tmp_path / "out", tokenizer_name="me/tokenizer", dtype=dtype)
    assert path == tmp_path / "out" / "model.gguf" and len(list(path.parent.iterdir())) == 1
    fields = fields_of(path)
    llama = plain_llama(model)
    assert fields["general.architecture"] == "llama"
    assert fields["simvq.tokenizer"] == "me/tokenizer" and fields["simvq.grid_size"] == [3, 4]
    assert fields["llama.context_length"] == 13 and fields["llama.embedding_length"] == 64
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(
        llama.config.rms_norm_eps
    )
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[0] == "<|image_code_0|>" and tokens[-3:] == [
        *("<|image_class_1|>", "<|image_start|>", "<|image_end|>"),
    ]
    assert fields["tokenizer.ggml.eos_token_id"] == 35 and fields["general.sampling.top_k"] == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(llama.state_dict())
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"} | (
        {"F16"} if dtype == "float16" else set()
    )
    # Rows of queries: within each head of 8, those that a position turns together are neighbours.
    rows = llama.model.layers[0].self_attn.q_proj.weight[[0, 4, 1, 5, 2, 6, 3, 7]].detach()
    found = torch.from_numpy(tensors["blk.0.attn_q.weight"].data.copy()).float()[:8]
    torch.testing.assert_close(found, rows, rtol=1e-3, atol=1e-4)


def test_gguf_of_another_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float32 or float16, got 'q4_0'"):
        export_gguf(image_model(), tmp_path / "out", dtype="q4_0")


def test_without_gguf_the_message_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ValueError, match=r'GGUF needs gguf: pip install "modeling-simvq\[export\]"'
    ):
        export_gguf(image_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Answer(io.BytesIO):
    """Of a server that continues prompts by the folder `exported`, as urlopen returns it."""

    def __init__(self, request):
        asked = json.loads(request.data)
        tokenizer = AutoTokenizer.from_pretrained(asked["model"])
        llama = LlamaForCausalLM.from_pretrained(asked["model"])
        prompt = tokenizer(asked["prompt"], return_tensors="pt")
        made = llama.generate(**prompt, max_new_tokens=asked["max_tokens"])
        assert asked["return_token_ids"] and request.full_url.endswith("/v1/completions")
        ids = made[0, prompt["input_ids"].shape[1] :].tolist()
        super().__init__(json.dumps({"choices": [{"token_ids": ids}]}).encode())


@pytest.mark.slow
def test_the_snippets_of_the_docs_run(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    section = page.split("## Served by an engine")[1].split("\n## ")[0]
    export, ask = (part.split("```")[0] for part in section.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    model = varied(image_model(codebook_size=64, num_classes=8, grid_size=(16, 16)))
    model.save_pretrained("runs/generator/model")
    shutil.copytree(tiny_folder, "runs/tokenizer/model")
    exec(export, {})
    assert Path("exported-gguf/model.gguf").exists()
    monkeypatch.setattr("urllib.request.urlopen", Answer)
    exec(ask, {})
    assert Image.open("served.png").size == (32, 32)
