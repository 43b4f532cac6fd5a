"""SimVQ tokenizers and generators as Hugging Face models. Importing registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioTokenization,
)

from .audio_stream import SimVQAudioStream
from .code_tokens import add_code_tokens
from .code_vocabulary import CodeLogitsProcessor, CodeVocabulary
from .configuration_simvq_audio import SimVQAudioConfig
from .configuration_simvq_generation import SimVQAudioGenerationConfig, SimVQImageGenerationConfig
from .configuration_simvq_image import SimVQImageConfig
from .export_generator import export_generator
from .export_gguf import export_gguf
from .feature_extraction_simvq import SimVQAudioFeatureExtractor
from .image_processing_simvq import SimVQImageProcessor
from .modeling_simvq_audio import SimVQAudioModel
from .modeling_simvq_generation import SimVQForAudioGeneration, SimVQForImageGeneration
from .modeling_simvq_image import SimVQImageModel
from .nearest_code import nearest_code
from .quantization_simvq import SimVQ

__version__ = "0.1.0"

__all__ = [
    "CodeLogitsProcessor",
    "CodeVocabulary",
    "SimVQ",
    "SimVQAudioConfig",
    "SimVQAudioFeatureExtractor",
    "SimVQAudioGenerationConfig",
    "SimVQAudioModel",
    "SimVQAudioStream",
    "SimVQForAudioGeneration",
    "SimVQForImageGeneration",
    "SimVQImageConfig",
    "SimVQImageGenerationConfig",
    "SimVQImageModel",
    "SimVQImagePipeline",
    "SimVQImageProcessor",
    "add_code_tokens",
    "export_generator",
    "export_gguf",
    "nearest_code",
]

AutoConfig.register("simvq_image", SimVQImageConfig)
AutoModel.register(SimVQImageConfig, SimVQImageModel)
# One class serves both of transformers' back ends: it resizes by PIL or by torch as the input is.
AutoImageProcessor.register(
    SimVQImageConfig,
    image_processor_classes={"pil": SimVQImageProcessor, "torchvision": SimVQImageProcessor},
)

AutoConfig.register("simvq_audio", SimVQAudioConfig)
AutoModel.register(SimVQAudioConfig, SimVQAudioModel)
AutoModelForAudioTokenization.register(SimVQAudioConfig, SimVQAudioModel)
AutoFeatureExtractor.register(SimVQAudioConfig, SimVQAudioFeatureExtractor)

AutoConfig.register("simvq_image_generation", SimVQImageGenerationConfig)
AutoModel.register(SimVQImageGenerationConfig, SimVQForImageGeneration)
AutoConfig.register("simvq_audio_generation", SimVQAudioGenerationConfig)
AutoModel.register(SimVQAudioGenerationConfig, SimVQForAudioGeneration)

# save_pretrained then writes the code beside the weights, for trust_remote_code.
SimVQImageConfig.register_for_auto_class()
SimVQImageModel.register_for_auto_class("AutoModel")
SimVQImageProcessor.register_for_auto_class("AutoImageProcessor")
SimVQAudioConfig.register_for_auto_class()
SimVQAudioModel.register_for_auto_class("AutoModel")
SimVQAudioFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
for _config, _model in (
    (SimVQImageGenerationConfig, SimVQForImageGeneration),
    (SimVQAudioGenerationConfig, SimVQForAudioGeneration),
):
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")


def __getattr__(name: str):
    # The pipeline needs diffusers, which nothing else here does and which takes long to import.
    if name == "SimVQImagePipeline":
        from .pipeline_simvq_image import SimVQImagePipeline

        return SimVQImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
