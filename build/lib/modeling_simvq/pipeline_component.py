"""Loaders by which diffusers opens a pipeline's repository without this package, as transformers does.

diffusers copies, of a component's own code, one file and what that imports directly. This is that file, in each
folder; transformers then takes the code at the repository's root. It only runs if the user has passed
trust_remote_code to diffusers.
"""

import os

# diffusers looks for these two names here, to know what may be passed instead of a component.
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    ImageProcessingMixin,
    PreTrainedModel,
)


class SimVQComponentConfig:
    """Stands for a model's configuration; from_pretrained returns it. device_map="balanced" needs it."""

    @classmethod
    def from_pretrained(cls, repository: str | os.PathLike, subfolder: str, **kwargs):
        """The configuration in a folder of a repository, with the code at its root."""
        return AutoConfig.from_pretrained(repository, subfolder=subfolder, trust_remote_code=True)


class SimVQModelComponent(PreTrainedModel):
    """Stands for a model: from_pretrained returns the model, and so does a call with its configuration."""

    config_class = SimVQComponentConfig

    def __new__(cls, config):
        return AutoModel.from_config(config, trust_remote_code=True)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs) -> PreTrainedModel:
        """The model in this folder of a repository, with the code at its root."""
        root, name = os.path.split(os.path.normpath(folder))
        return AutoModel.from_pretrained(root, subfolder=name, trust_remote_code=True, **kwargs)


class SimVQProcessorComponent(ImageProcessingMixin):
    """Stands for an image processor; from_pretrained returns it."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs):
        """The image processor in this folder of a repository, with the code at its root."""
        root, name = os.path.split(os.path.normpath(folder))
        return AutoImageProcessor.from_pretrained(
            root, subfolder=name, trust_remote_code=True, **kwargs
        )
