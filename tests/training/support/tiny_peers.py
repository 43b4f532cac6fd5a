"""Small tokenizers of other libraries, with random weights."""

from diffusers import AutoencoderKL, VQModel
from torch import nn
from transformers import (
    DacConfig,
    DacModel,
    Emu3Config,
    Emu3ForConditionalGeneration,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    NeuCodecConfig,
    NeuCodecModel,
    Xcodec2Config,
    Xcodec2Model,
)
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
}
SEANET = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_size": 32}
ENCODEC = SEANET | {"num_lstm_layers": 1, "target_bandwidths": [15.0, 30.0]}
# Of the 48 kHz model: stereo, in chunks, scaled.
STEREO = {"normalize": True, "chunk_length_s": 0.05, "overlap": 0.01, "audio_channels": 2}
STEREO |= {"use_causal_conv": False, "norm_type": "time_group_norm"}

IMAGES = {"embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
EMU3 = IMAGES | {"codebook_size": 32, "latent_channels": 4, "attn_resolutions": [1]}
EMU3 |= {"hidden_size": 32, "num_attention_heads": 1}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
SPEECH = {"model_type": "wav2vec2-bert", "hidden_size": 16, "num_hidden_layers": 1}
SPEECH |= {"num_attention_heads": 2, "intermediate_size": 16, "output_hidden_size": 16}
SPEECH |= {"feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 3}
SEMANTIC = LLAMA | {"head_dim": 16, "encoder_hidden_size": 4, "quantization_dim": 48}
SEMANTIC |= {"semantic_model_config": SPEECH}


def vq_model(**options) -> VQModel:
    return VQModel(**BLOCKS, latent_channels=4, num_vq_embeddings=32, **options)


def autoencoder_kl() -> AutoencoderKL:
    return AutoencoderKL(**BLOCKS, latent_channels=4)


def dac() -> DacModel:
    config = DacConfig(
        encoder_hidden_size=8,
        decoder_hidden_size=32,
        downsampling_ratios=[2, 4],
        n_codebooks=3,
        codebook_size=32,
        codebook_dim=4,
    )
    return DacModel(config)


def encodec(**options) -> EncodecModel:
    return with_codes(EncodecModel(EncodecConfig(**(ENCODEC | options))))


def mimi() -> MimiModel:
    config = MimiConfig(
        **SEANET,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=4,
        upsample_groups=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return with_codes(MimiModel(config))


def xcodec2() -> Xcodec2Model:
    return louder(Xcodec2Model(Xcodec2Config(**SEMANTIC)))


def neucodec() -> NeuCodecModel:
    return louder(NeuCodecModel(NeuCodecConfig(**SEMANTIC)))


def emu3() -> Emu3VQVAE:
    return Emu3VQVAE(Emu3VQVAEConfig(**EMU3))


def whole_emu3() -> Emu3ForConditionalGeneration:
    """The language model too."""
    words = {"<image>": 0, "<|extra_200|>": 1, "<|visual token 0|>": 2}
    text = LLAMA | {"vocab_size": 64, "pad_token_id": 0}
    config = Emu3Config(vq_config=EMU3, text_config=text, vocabulary_map=words)
    return Emu3ForConditionalGeneration(config)


def janus() -> JanusVQVAE:
    config = JanusVQVAEConfig(**IMAGES, num_embeddings=32, latent_channels=32, num_patches=16)
    return JanusVQVAE(config)


def with_codes(model: nn.Module) -> nn.Module:
    """Draw the codebooks of EnCodec and Mimi, which start as zeros."""
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            nn.init.normal_(buffer, std=0.01)
        elif name.endswith("cluster_usage"):
            buffer.fill_(1)
    return model


def louder(model: nn.Module) -> nn.Module:
    """Draw larger matrices than transformers does: with those, all positions get one code, and silence."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def save(model: nn.Module, folder) -> str:
    """Save a model and return its folder."""
    model.save_pretrained(folder)
    return str(folder)
