"""Small tokenizers of other libraries, with random weights."""

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

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


def with_codes(model: nn.Module) -> nn.Module:
    """Draw the codebooks of EnCodec and Mimi, which start as zeros."""
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            nn.init.normal_(buffer, std=0.01)
        elif name.endswith("cluster_usage"):
            buffer.fill_(1)
    return model


@torch.no_grad()
def save(model: nn.Module, folder) -> str:
    """Save a model that nothing was drawn for but by its own initialisation; return the folder as text."""
    model.save_pretrained(folder)
    return str(folder)
