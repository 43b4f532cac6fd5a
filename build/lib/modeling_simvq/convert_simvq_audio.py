"""Layout of the authors' audio checkpoints, for convert_simvq_checkpoint."""

import re
from collections.abc import Callable

from .configuration_simvq_audio import SimVQAudioConfig
from .feature_extraction_simvq import SimVQAudioFeatureExtractor
from .modeling_simvq_audio import SimVQAudioModel

NAME, MODEL = "audio", SimVQAudioModel
KEPT = ("encoder.", "quantize.", "backbone.", "head.")
# The discriminators are not part of the tokenizer, and its SEANet decoder is never called. The window of
# the inverse STFT is always Hann's; the model makes it.
DROPPED = ("loss.", "decoder.", "head.istft.window")

_PARTS = {
    r"^quantize\.embedding\.weight$": "quantizer.basis",
    r"^quantize\.embedding_proj\.": "quantizer.projection.",
    r"^backbone\.embed\.": "decoder.conv_in.",
    r"^backbone\.pos_net\.": "decoder.position_net.",
    r"^backbone\.norm\.": "decoder.norm_in.",
    r"^backbone\.convnext\.": "decoder.blocks.",
    r"^backbone\.final_layer_norm\.": "decoder.norm_out.",
    r"^head\.out\.": "decoder.head.",
    r"\.gamma$": ".layer_scale",
    r"\.dwconv\.": ".depthwise.",
    r"\.pwconv1\.": ".expand.",
    r"\.pwconv2\.": ".contract.",
    r"^(decoder\.position_net\.2\.)q\.": r"\1query.",
    r"^(decoder\.position_net\.2\.)k\.": r"\1key.",
    r"^(decoder\.position_net\.2\.)v\.": r"\1value.",
    r"^(decoder\.position_net\.2\.)proj_out\.": r"\1out.",
    r"\.weight_g$": ".parametrizations.weight.original0",
    r"\.weight_v$": ".parametrizations.weight.original1",
}


def read_settings(arguments: dict) -> dict:
    """Read what tensors cannot tell from init_args of the authors' config.yaml."""
    return {
        "causal": bool(arguments["ddconfig"].get("causal", True)),
        "sampling_rate": int(arguments.get("sample_rate", 24000)),
    }


def infer_config(shape: Callable, count: Callable, settings: dict, **quantizer) -> SimVQAudioConfig:
    """Configuration from shape(name, dimensions) of tensors and count(pattern) of numbered modules."""
    # The encoder is one numbered list: convolution, then per level its residual blocks, an activation and
    # a strided convolution whose kernel is twice the stride, then LSTM, activation, convolution.
    blocks = 0
    while count(rf"encoder\.model\.{blocks + 1}\.block\.(\d+)\."):
        blocks += 1
    levels = count(r"encoder\.model\.(\d+)\.block\.") // (blocks + 2) + 1
    strides = [
        f"encoder.model.{(level + 1) * (blocks + 2)}.conv.conv.weight_v" for level in range(levels)
    ]
    hidden_size = shape("backbone.embed.weight", 3)[0]
    layers = count(r"backbone\.convnext\.(\d+)\.")
    return SimVQAudioConfig(
        sampling_rate=settings.get("sampling_rate", 24000),
        causal=settings.get("causal", True),
        num_filters=shape("encoder.model.0.conv.conv.weight_v", 3)[0],
        downsampling_ratios=[shape(name, 3)[2] // 2 for name in strides],
        num_residual_layers=blocks,
        num_lstm_layers=count(r"encoder\.model\.\d+\.lstm\.weight_ih_l(\d+)$"),
        hidden_size=hidden_size,
        intermediate_size=shape("backbone.convnext.0.pwconv1.weight", 2)[0],
        num_decoder_layers=layers,
        n_fft=shape("head.out.weight", 2)[0] - 2,
        **quantizer,
    )


def rename(name: str, config: SimVQAudioConfig) -> str:
    """Our name of an original tensor."""
    found = re.match(r"encoder\.model\.(\d+)\.(.*)", name)
    if found:
        name = _rename_encoder(int(found.group(1)), found.group(2), config)
    for pattern, ours in _PARTS.items():
        name = re.sub(pattern, ours, name)
    return name


def _rename_encoder(index: int, rest: str, config: SimVQAudioConfig) -> str:
    blocks, levels = config.num_residual_layers, len(config.downsampling_ratios)
    rest = rest.replace("conv.conv.", "conv.")
    if rest.startswith("lstm."):
        return f"encoder.{rest}"
    if index == 0:
        return f"encoder.conv_in.{rest}"
    level, place = divmod(index - 1, blocks + 2)
    if level == levels:
        return f"encoder.conv_out.{rest}"
    if place < blocks:
        rest = rest.replace("block.1.", "conv1.").replace("block.3.", "conv2.")
        return f"encoder.levels.{level}.blocks.{place}.{rest}"
    return f"encoder.levels.{level}.conv.{rest}"


def processor(config: SimVQAudioConfig, settings: dict) -> SimVQAudioFeatureExtractor:
    """The feature extractor."""
    return SimVQAudioFeatureExtractor(
        sampling_rate=config.sampling_rate, hop_length=config.hop_length
    )
