"""A code model as a plain Llama, which any engine serves without this package.

    export_generator(generator, "exported")     # config.json, model.safetensors, tokenizer.json, ...
    LlamaForCausalLM.from_pretrained("exported")

Token ids are those of the code model: code k is k, then come the classes and the start, and one more, the end.
So what an engine returns after a prompt are the codes themselves.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .code_model import SimVQGenerationModel
from .code_prediction import PlainCodes
from .code_vocabulary import boundary_tokens, code_token
from .hooked_weights import is_offloaded
from .modeling_simvq_generation import SimVQForAudioGeneration, SimVQForImageGeneration
from .new_folder import new_folder

NAMES = {SimVQForImageGeneration: "image", SimVQForAudioGeneration: "audio"}
# Engines split widths among devices and quantise them in blocks: 64 suits both.
_WIDTH_MULTIPLE = 64
# Logits of tokens that are no codes are minus this over the root mean square of the last hidden state: below
# -100 while that is below 300. It is the largest power of two that float16 has.
_FORBIDDING = 2.0**15


def export_generator(
    model: SimVQGenerationModel, output: str | Path, tokenizer_name: str | None = None
) -> Path:
    """Write a code model as a folder that transformers' LlamaForCausalLM and AutoTokenizer load.

    Args:
        model: SimVQForImageGeneration or SimVQForAudioGeneration, of any floating-point type.
        output: folder, new or empty.
        tokenizer_name: folder or Hub repository of the SimVQ tokenizer that decodes the codes; config.json
            keeps it as simvq_tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is of another class, cannot be a plain Llama, or the folder is not empty.
    """
    with new_folder(output) as folder:
        llama = plain_llama(model)
        if tokenizer_name is not None:
            llama.config.simvq_tokenizer = str(tokenizer_name)
        llama.save_pretrained(folder)
        for name, content in tokenizer_files(model).items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return Path(output)


@torch.no_grad()
def plain_llama(model: SimVQGenerationModel) -> LlamaForCausalLM:
    """Return a Llama over all tokens that predicts as the code model does: its logits of codes, and no others.

    A code model has no logits for starts, and none for an end, which no sample of its training had. Rows of
    zeros would give these tokens the logit 0, which is likely enough to be sampled; Llama's head has no bias to
    forbid them. So the residual stream gets one more value, a constant c > 0: every token's vector brings it,
    no layer reads or changes it. After the last norm it is 1 / rms, positive whatever the input, and the rows
    of these tokens weigh it with a large negative number. The width grows to the next multiple of 64, by zeros.

    Norms then average over D' values rather than D, and c adds to their sum of squares. Weights multiplied by
    sqrt(D / D') and a smaller epsilon, (D * epsilon - c ** 2) / D', undo both exactly.

    Raises:
        ValueError: if the model is of another class, predicts several codes a position or codes in two factors,
            has no epsilon to take c from, or its weights are elsewhere.
    """
    name, config = kind_of(model), model.config
    if config.num_quantizers > 1:
        raise ValueError(
            f"num_quantizers = {config.num_quantizers}: it predicts several codes at a step, and a Llama one "
            "token: serve this model with transformers, or train on codes of one quantizer"
        )
    if not isinstance(model.codes, PlainCodes):
        raise ValueError(
            f"code_factors = {list(config.code_factors)} predicts the second through a hidden layer, which "
            "Llama lacks: train with code_factors=None, or serve this model with transformers"
        )
    if is_offloaded(model):
        raise ValueError("some weights are offloaded: load the model without device_map first")
    width, dtype = config.hidden_size, model.dtype
    wide = (width // _WIDTH_MULTIPLE + 1) * _WIDTH_MULTIPLE
    constant = torch.tensor(math.sqrt(width * config.rms_norm_eps / 2), dtype=dtype).item()
    if not constant or 1 / constant > torch.finfo(dtype).max:
        raise ValueError(
            f"rms_norm_eps = {config.rms_norm_eps:g} is too small in {dtype}: what forbids other tokens is "
            "taken from it"
        )
    end = config.codebook_size + config.num_start_tokens

    inside = config.llama_config().to_dict()
    inside |= {
        "vocab_size": end + 1,
        "hidden_size": wide,
        "head_dim": config.head_dim,
        "rms_norm_eps": (width * config.rms_norm_eps - constant**2) / wide,
        "bos_token_id": end - 1,  # the start, or no class
        "eos_token_id": end,
        "pad_token_id": end,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    if name == "image":
        inside |= {"id2label": config.id2label, "grid_size": list(config.grid_size)}
    llama = LlamaForCausalLM(LlamaConfig(**inside))
    llama.config.rope_theta = config.rope_theta  # where transformers 4 looks

    llama.load_state_dict(_wide_weights(model, wide, constant), assign=True)
    llama.generation_config = GenerationConfig(
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        max_new_tokens=config.longest_sequence - 1,
        do_sample=True,  # from all codes, as generate_images and generate_audio do
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return llama.eval()


def kind_of(model: SimVQGenerationModel) -> str:
    """Return "image" or "audio", of what a code model makes codes.

    Raises:
        ValueError: if it is no code model, naming its class.
    """
    for kind, name in NAMES.items():
        if isinstance(model, kind):
            return name
    raise ValueError(
        f"a {type(model).__name__} is no code model: "
        f"{' and '.join(kind.__name__ for kind in NAMES)} can be exported"
    )


def tokens_of(model: SimVQGenerationModel) -> list[str]:
    """Return the tokens of an exported code model in the order of their ids.

    <|image_code_0|>, ..., <|image_class_0|>, ..., <|image_start|>, which is "no class", <|image_end|>.
    Audio has no classes.
    """
    name = kind_of(model)
    classes = range(model.config.num_start_tokens - 1)
    return [
        *(code_token(name, code) for code in range(model.config.codebook_size)),
        *(f"<|{name}_class_{label}|>" for label in classes),
        *boundary_tokens(name),
    ]


def tokenizer_files(model: SimVQGenerationModel) -> dict[str, dict]:
    """Return the contents of tokenizer.json and tokenizer_config.json, by file name.

    Codes are words of a vocabulary rather than added tokens, of which 262,144 take seconds to load. There is no
    unknown token: other text in a prompt is an error.
    """
    tokens = tokens_of(model)
    start, end = tokens[-2:]
    added = [
        {"id": number, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number, token in ((len(tokens) - 2, start), (len(tokens) - 1, end))
    ]
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"<\|[a-z0-9_]+\|>"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {token: number for number, token in enumerate(tokens)},
                "unk_token": "<|unknown|>",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": model.config.longest_sequence,
            "clean_up_tokenization_spaces": False,
        },
    }


def _wide_weights(model: SimVQGenerationModel, wide: int, constant: float) -> dict[str, Tensor]:
    """Return the weights of plain_llama, by name, of width `wide` and with the constant."""
    codes, width, size = model.codes, model.config.hidden_size, model.config.codebook_size
    table, scale = codes.table.weight, math.sqrt(width / wide)
    embedding = _widened(table, (len(table) + 1, wide))
    embedding[:, width] = constant
    head = _widened(table[:size] if codes.head is None else codes.head.weight, embedding.shape)
    head[size:, width] = -_FORBIDDING
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for key, weight in model.state_dict().items():
        if "embed_tokens" in key:
            continue
        if weight.ndim == 1:  # of norms
            weights[key] = _widened((weight.float() * scale).to(weight.dtype), (wide,))
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            weights[key] = _widened(weight, (wide, weight.shape[1]))
        else:
            weights[key] = _widened(weight, (len(weight), wide))
    weights["model.norm.weight"][width] = scale / constant
    return weights


def _widened(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Copy a weight into the corner of zeros of a larger shape."""
    larger = value.new_zeros(shape)
    larger[tuple(slice(size) for size in value.shape)] = value
    return larger
