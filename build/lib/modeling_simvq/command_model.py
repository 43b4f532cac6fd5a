"""Loading of a tokenizer for a command, with this package's code and no other."""

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from .configuration_simvq_audio import SimVQAudioConfig
from .configuration_simvq_image import SimVQImageConfig
from .feature_extraction_simvq import SimVQAudioFeatureExtractor
from .image_processing_simvq import SimVQImageProcessor
from .modeling_simvq_audio import SimVQAudioModel
from .modeling_simvq_image import SimVQImageModel

TOKENIZERS = {
    SimVQImageConfig.model_type: (SimVQImageModel, SimVQImageProcessor),
    SimVQAudioConfig.model_type: (SimVQAudioModel, SimVQAudioFeatureExtractor),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Tokenizer:
    """Tokenizer that is ready to be used.

    Attributes:
        name: folder or id of the Hub, as it was given.
        digest: of its weights.
    """

    name: str
    model: PreTrainedModel
    processor: SimVQImageProcessor | SimVQAudioFeatureExtractor
    digest: str


def load_tokenizer(
    name: str, revision: str | None = None, device: str = "cpu", dtype: str = "float32"
) -> Tokenizer:
    """Load an image or audio tokenizer in evaluation mode.

    Raises:
        ValueError: if it is not found, or is something else; if the device is not there.
        OSError: if its weights are missing or damaged.
    """
    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    model_class, processor_class = TOKENIZERS[model_type(name, revision)]
    transformers_logging.disable_progress_bar()
    model = model_class.from_pretrained(name, revision=revision).eval()
    processor = processor_class.from_pretrained(name, revision=revision)
    digest = weights_digest(model)
    return Tokenizer(name, model.to(where, DTYPES[dtype]), processor, digest)


def model_type(name: str, revision: str | None = None) -> str:
    """Return the type of a tokenizer, from its configuration.

    Raises:
        ValueError: if there is none, or of another type.
    """
    kind = stored_type(name, revision)
    if kind not in TOKENIZERS:
        raise ValueError(f"{name} is of type {kind}, not one of {', '.join(TOKENIZERS)}")
    return kind


def stored_type(name: str, revision: str | None = None) -> str | None:
    """Return the type that a model's configuration states, whatever it is.

    Raises:
        ValueError: if there is no model.
    """
    try:
        found, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is neither a folder here nor a model of the Hub: {error}"
        ) from error
    if not found:
        raise ValueError(f"{name} holds no model: it has no config.json")
    return found.get("model_type")


def weights_digest(model: PreTrainedModel) -> str:
    """Return a digest of all weights, 16 hexadecimal digits: equal exactly for equal weights of one type."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
