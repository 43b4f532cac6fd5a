"""A code model as a GGUF file, which llama.cpp and what is built on it read."""

from pathlib import Path

from torch import Tensor

from .code_model import SimVQGenerationModel
from .export_generator import plain_llama, tokens_of
from .missing_packages import needing
from .new_folder import new_folder

# transformers' names of a layer's weights, and GGUF's.
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FILE = "model.gguf"


def export_gguf(
    model: SimVQGenerationModel,
    output: str | Path,
    tokenizer_name: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a code model as OUTPUT/model.gguf.

    Args:
        model: SimVQForImageGeneration or SimVQForAudioGeneration.
        output: folder, new or empty.
        tokenizer_name: folder or Hub repository of the SimVQ tokenizer that decodes the codes; the file keeps
            it under simvq.tokenizer.
        dtype: of matrices, "float32" or "float16"; vectors are float32. llama.cpp's own llama-quantize makes
            smaller types of it.

    Returns:
        The file.

    Raises:
        ValueError: as export_generator does; on another dtype, or if the package gguf is missing.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    with needing("GGUF", "export"):
        import gguf

    with new_folder(output) as folder:
        llama, tokens = plain_llama(model), tokens_of(model)
        config, vocabulary = llama.config, len(tokens)
        writer = gguf.GGUFWriter(folder / FILE, "llama")
        writer.add_name(Path(output).name)
        writer.add_file_type(
            gguf.LlamaFileType[{"float32": "ALL_F32", "float16": "MOSTLY_F16"}[dtype]]
        )
        writer.add_vocab_size(vocabulary)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        # Sampling from all codes, as generate_images and generate_audio do.
        writer.add_sampling_temp(1.0)
        writer.add_sampling_top_k(0)
        writer.add_sampling_top_p(1.0)
        writer.add_sampling_min_p(0.0)
        if tokenizer_name is not None:
            writer.add_string("simvq.tokenizer", str(tokenizer_name))
        if grid := getattr(config, "grid_size", None):
            writer.add_array("simvq.grid_size", list(grid))

        # llama.cpp finds user-defined tokens in any text, so that byte pairs have nothing left to do; the file
        # must name at least one pair.
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        types = [gguf.TokenType.USER_DEFINED] * (vocabulary - 2) + [gguf.TokenType.CONTROL] * 2
        writer.add_token_types(types)
        writer.add_token_merges(["< |"])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)

        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, weight in llama.state_dict().items():
            kind = name.split(".")[-2]
            if kind in heads:
                weight = _interleaved(weight, heads[kind])
            weight = weight.float().cpu()
            if dtype == "float16" and weight.ndim == 2:
                weight = weight.half()
            writer.add_tensor(_name(name), weight.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(output) / FILE


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * d, D): positions turn i with i + 1 in llama.cpp, with i + d / 2 in transformers."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
