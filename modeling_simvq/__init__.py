"""SimVQ tokenizers as Hugging Face models. Importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_simvq_image import SimVQImageConfig
from .image_processing_simvq import SimVQImageProcessor
from .modeling_simvq_image import SimVQImageModel
from .nearest_code import nearest_code
from .quantization_simvq import SimVQ

__version__ = "0.1.0"

__all__ = [
    "SimVQ",
    "SimVQImageConfig",
    "SimVQImageModel",
    "SimVQImageProcessor",
    "nearest_code",
]

AutoConfig.register("simvq_image", SimVQImageConfig)
AutoModel.register(SimVQImageConfig, SimVQImageModel)
# One class serves both of transformers' back ends: it resizes by PIL or by torch as the input is.
AutoImageProcessor.register(
    SimVQImageConfig,
    image_processor_classes={"pil": SimVQImageProcessor, "torchvision": SimVQImageProcessor},
)

# save_pretrained then writes the code beside the weights, for trust_remote_code.
SimVQImageConfig.register_for_auto_class()
SimVQImageModel.register_for_auto_class("AutoModel")
SimVQImageProcessor.register_for_auto_class("AutoImageProcessor")
