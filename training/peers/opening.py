"""Open a tokenizer, whosever it is: by the model_type or the _class_name in its config.json."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

import modeling_simvq  # noqa: F401  (registers the models)
from training.peers.audio import RESIDUAL
from training.peers.images import DIFFUSERS, open_diffusers
from training.peers.multimodal import MULTIMODAL, WITHOUT_DECODER, open_multimodal
from training.peers.semantic_audio import SEMANTIC, SemanticPeer
from training.runtime.errors import SettingsError
from training.runtime.pretrained import load_pretrained

# What is accepted, in words of an error message.
IMAGES = "SimVQ; of diffusers VQModel, AutoencoderKL; of transformers Emu3, Janus"
AUDIO = "SimVQ; of transformers DAC, EnCodec, Mimi, X-Codec 2, NeuCodec"


def open_image_tokenizer(
    name: str,
    subfolder: str | None = None,
    pixel_range: tuple[float, float] = (-1.0, 1.0),
) -> nn.Module:
    """Load an image tokenizer with the face of SimVQImageModel, in evaluation mode.

    Args:
        name: folder, or name on the Hub.
        subfolder: of a pipeline, the tokenizer's.
        pixel_range: lowest and highest pixel value that another library's tokenizer was trained on.

    Raises:
        SettingsError: if it is none that is accepted, or weights are missing.
    """
    kind = kind_of(name, subfolder)
    if kind == "simvq_image":
        return AutoModel.from_pretrained(name, subfolder=subfolder or "").eval()
    if kind in DIFFUSERS:
        return open_diffusers(kind, name, subfolder, pixel_range)
    if kind in MULTIMODAL:
        return open_multimodal(kind, name)
    if kind in WITHOUT_DECODER:
        raise SettingsError(
            f"model: {name} ({kind}): Chameleon's tokenizer has no decoder in transformers, it cannot "
            f"reconstruct; there are {IMAGES}"
        )
    raise SettingsError(_refusal(name, kind, "image", IMAGES))


def open_audio_tokenizer(name: str) -> nn.Module:
    """Load an audio tokenizer with the face of SimVQAudioModel, in evaluation mode.

    Args:
        name: folder, or name on the Hub.

    Raises:
        SettingsError: if it is none that is accepted, or weights are missing.
    """
    kind = kind_of(name)
    if kind == "simvq_audio":
        return AutoModel.from_pretrained(name).eval()
    if kind in RESIDUAL or kind in SEMANTIC:
        # What the Hub's repository may hold of code is not run.
        model = load_pretrained(AutoModel, name, dtype=torch.float32, trust_remote_code=False)
        return RESIDUAL[kind](model) if kind in RESIDUAL else SemanticPeer(model, SEMANTIC[kind])
    raise SettingsError(_refusal(name, kind, "audio", AUDIO))


def kind_of(name: str, subfolder: str | None = None) -> str:
    """Return the model_type or, of diffusers' models, the _class_name of a model.

    Raises:
        SettingsError: if its configuration names neither, or there is none, as in a pipeline of several parts.
    """
    config, _ = PreTrainedConfig.get_config_dict(name, subfolder=subfolder or "")
    kind = config.get("model_type") or config.get("_class_name")
    if not isinstance(kind, str):
        raise SettingsError(
            f"model: {name} has no config.json that names a model_type or a _class_name; of a pipeline of "
            "diffusers name the tokenizer's folder, subfolder=vae or vqvae"
        )
    return kind


def _refusal(name: str, kind: str, noun: str, accepted: str) -> str:
    return f"model: {name} ({kind}) is no {noun} tokenizer that is known here: {accepted}"
