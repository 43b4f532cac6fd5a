"""A diffusers pipeline from classes to pictures: tokenizer, generator and processor in one repository.

With this package: ``SimVQImagePipeline.from_pretrained(repository)``. Without it:
``DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)``.
"""

import difflib
import inspect
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .simvq_component import SimVQModelComponent, SimVQProcessorComponent

if TYPE_CHECKING:
    # diffusers fetches what a pipeline's file imports relatively: that is how this code reaches the machine.
    from .image_processing_simvq import SimVQImageProcessor  # noqa: F401
    from .modeling_simvq_generation import SimVQForImageGeneration  # noqa: F401
    from .modeling_simvq_image import SimVQImageModel  # noqa: F401

COMPONENTS = {
    "tokenizer": SimVQModelComponent,
    "transformer": SimVQModelComponent,
    "processor": SimVQProcessorComponent,
}
_OF_MODELS_ALONE = ("dtype", "torch_dtype", "device_map", "attn_implementation")


class SimVQImagePipeline(DiffusionPipeline):
    """Pictures of a class.

    Args:
        tokenizer: SimVQImageModel, which decodes.
        transformer: SimVQForImageGeneration, which makes the codes.
        processor: SimVQImageProcessor, which makes PIL images of pixels.

    Raises:
        ValueError: if tokenizer and transformer do not have the same number of codes.
    """

    model_cpu_offload_seq = "transformer->tokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedModel,
        transformer: PreTrainedModel,
        processor: BaseImageProcessor,
    ):
        super().__init__()
        here, there = tokenizer.config.codebook_size, transformer.config.codebook_size
        if here != there:
            raise ValueError(
                f"the tokenizer has {here} codes, but the transformer was made for {there}"
            )
        self.register_modules(tokenizer=tokenizer, transformer=transformer, processor=processor)

    @classmethod
    def from_pretrained(cls, repository: str, **kwargs) -> "SimVQImagePipeline":
        """Load from a folder or the Hub, with the code of this package.

        Args:
            kwargs: as of AutoModel.from_pretrained: dtype, revision, token, cache_dir, ...
        """
        place = {key: value for key, value in kwargs.items() if key not in _OF_MODELS_ALONE}
        return cls(
            AutoModel.from_pretrained(repository, subfolder="tokenizer", **kwargs),
            AutoModel.from_pretrained(repository, subfolder="transformer", **kwargs),
            AutoImageProcessor.from_pretrained(repository, subfolder="processor", **place),
        )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write the repository: weights as safetensors, and the code for trust_remote_code.

        ``push_to_hub(name)`` sends the same to the Hub.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder: call push_to_hub(name) instead")
        super().save_pretrained(save_directory, **kwargs)
        root, source = Path(save_directory), Path(inspect.getfile(type(self)))
        component = source.with_name(SimVQModelComponent.__module__.split(".")[-1] + ".py")
        for name in COMPONENTS:
            for code in (root / name).glob("*.py"):  # one copy for all, where transformers looks
                code.replace(root / code.name)
            shutil.copyfile(component, root / name / component.name)
        for file in (source, component):
            shutil.copyfile(file, root / file.name)
        index = json.loads((root / self.config_name).read_text())
        index["_class_name"] = [source.stem, type(self).__name__]
        index |= {name: [component.stem, loader.__name__] for name, loader in COMPONENTS.items()}
        (root / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | list[str | int] | None = None,
        num_images: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            classes: name or number of a class, or several; None for pictures of no class in particular.
            num_images: pictures of each class.
            guidance_scale, temperature, top_k, top_p, generator: as of
                SimVQForImageGeneration.generate_images.
            batch_size: pictures that are made at the same time.
            output_type: "pil" for PIL images; "pt" for a tensor (N, 3, H, W) in about [-1, 1].

        Returns:
            Output whose ``images`` are the pictures, class by class.

        Raises:
            ValueError: naming the argument that is impossible.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be pil or pt, got {output_type!r}")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        chosen = classes if isinstance(classes, (list, tuple)) else [classes]
        labels = [self.class_label(one) for one in chosen for _ in range(num_images)]
        if not labels:
            raise ValueError("classes is an empty list")
        batches = torch.tensor(labels).split(batch_size)
        height, width = self.transformer.config.grid_size
        pictures = []
        with self.progress_bar(total=len(batches) * height * width) as bar:
            for batch in batches:
                codes = self.transformer.generate_images(
                    batch,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                    streamer=_Progress(bar),
                )
                codes = codes.to(self.tokenizer.device)
                pixels = self.tokenizer.decode(image_codes=codes).pixel_values
                pictures.extend(
                    self.processor.post_process(pixels) if output_type == "pil" else pixels
                )
        images = pictures if output_type == "pil" else torch.stack(pictures)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def class_label(self, wanted: str | int | None) -> int:
        """Number of a class, from its number or name. Of "tench, Tinca tinca" each part is a name.

        Raises:
            ValueError: if there is no such class.
        """
        config = self.transformer.config
        if wanted is None:
            return config.null_class
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            if not 0 <= wanted <= config.null_class:
                raise ValueError(f"class {wanted} is not one of 0 to {config.num_classes - 1}")
            return wanted
        names = {}
        for label, name in config.id2label.items():
            for part in (name, *name.split(",")):
                names.setdefault(part.strip().lower(), label)
        found = names.get(str(wanted).strip().lower())
        if found is None:
            close = difflib.get_close_matches(str(wanted).lower(), names, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no class {wanted!r}{hint}")
        return found


class _Progress(BaseStreamer):
    """Moves the bar by one for each code of a batch."""

    def __init__(self, bar):
        self.bar, self.prompt = bar, True

    def put(self, value) -> None:
        if self.prompt:  # generate first puts what it was given
            self.prompt = False
        else:
            self.bar.update()

    def end(self) -> None:
        pass
