"""A diffusers pipeline from classes to images: tokenizer, generator and processor in one repository.

With this package: ``SimVQImagePipeline.from_pretrained(repository)``. Without it:
``DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)``.
"""

import inspect
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from transformers import AutoImageProcessor, AutoModel, BaseImageProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .class_names import class_label, class_labels
from .configuration_checks import refuse_unknown
from .hooked_weights import running_device
from .pipeline_component import SimVQModelComponent, SimVQProcessorComponent

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
# What this file imports and no component does.
_OWN_FILES = ("class_names.py",)
# What says where to load from, for processors too.
_WHERE = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
)


class SimVQImagePipeline(DiffusionPipeline):
    """Images of a class.

    Args:
        tokenizer: SimVQImageModel, which decodes.
        transformer: SimVQForImageGeneration, which makes the codes.
        processor: SimVQImageProcessor, which makes PIL images of pixels.

    Raises:
        ValueError: if one is of another kind, or the numbers of codes of tokenizer and transformer differ, or
            the transformer makes codes of more quantizers than the tokenizer has.
    """

    model_cpu_offload_seq = "transformer->tokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedModel,
        transformer: PreTrainedModel,
        processor: BaseImageProcessor,
    ):
        super().__init__()
        for name, model, kind in (
            ("tokenizer", tokenizer, "simvq_image"),
            ("transformer", transformer, "simvq_image_generation"),
        ):
            found = getattr(getattr(model, "config", None), "model_type", None)
            if found != kind:
                raise ValueError(
                    f"{name} must be a model of type {kind}, got {type(model).__name__}"
                    + (f" of type {found}" if found else "")
                )
        if not callable(getattr(processor, "post_process", None)):
            raise ValueError(
                f"processor must be a SimVQImageProcessor, got {type(processor).__name__}"
            )
        here, there = tokenizer.config.codebook_size, transformer.config.codebook_size
        if here != there:
            raise ValueError(
                f"the tokenizer has {here} codes, but the transformer was made for {there}"
            )
        here, there = tokenizer.config.num_quantizers, transformer.config.num_quantizers
        if here < there:
            raise ValueError(
                f"the tokenizer has {here} quantizers, but the transformer makes codes of {there}"
            )
        self.register_modules(tokenizer=tokenizer, transformer=transformer, processor=processor)

    @classmethod
    def from_pretrained(cls, repository: str, **kwargs) -> "SimVQImagePipeline":
        """Load from a folder or the Hub, with the code of this package.

        Args:
            kwargs: tokenizer, transformer, processor: components to take instead of the repository's; dtype,
                for all or as {"transformer": ..., "default": ...}; else as of AutoModel.from_pretrained:
                device_map, revision, token, cache_dir, ...
        """
        parts = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
        place = {key: value for key, value in kwargs.items() if key in _WHERE}
        for name in ("tokenizer", "transformer"):
            if name not in parts:
                own = kwargs | {
                    key: _of_component(kwargs[key], name)
                    for key in ("dtype", "torch_dtype")
                    if key in kwargs
                }
                parts[name] = AutoModel.from_pretrained(repository, subfolder=name, **own)
        if "processor" not in parts:
            parts["processor"] = AutoImageProcessor.from_pretrained(
                repository, subfolder="processor", **place
            )
        return cls(**parts)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """Register components as DiffusionPipeline does, so that from_pretrained finds what loads each.

        model_index.json names a file in the component's folder. diffusers cannot open that where a component is
        passed or device_map is "balanced"; the same code, which came with the pipeline and is trusted as it is,
        can be found by the name of its module.
        """
        init_dict, *rest = super().extract_init_dict(config_dict, **kwargs)
        for name, loader in COMPONENTS.items():
            if isinstance(init_dict.get(name), (list, tuple)) and init_dict[name][0] is not None:
                init_dict[name] = (loader.__module__, loader.__name__)
        return init_dict, *rest

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
        for file in (source, component, *map(source.with_name, _OWN_FILES)):
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        **unknown,
    ) -> ImagePipelineOutput | tuple:
        """Make images.

        Args:
            classes: name or number of a class, or several, also as an array or tensor; None for images of no
                class in particular.
            num_images: images of each class.
            guidance_scale, temperature, top_k, top_p: as of SimVQForImageGeneration.generate_images.
            generator: gives the seed, and moves on; or one for each image, which is then made by itself and
                does not depend on the others.
            batch_size: images that are made at the same time.
            output_type: "pil" for PIL images; "np" for an array (N, H, W, 3) in [0, 1]; "pt" for a tensor
                (N, 3, H, W) in about [-1, 1]; "latent" for the codes (N, h, w), or (N, Q, h, w), for the
                tokenizer's decode.

        Returns:
            Output whose ``images`` are the images, class by class.

        Raises:
            ValueError: naming the argument that is impossible.
            TypeError: naming an argument that there is not.
        """
        refuse_unknown("the pipeline", unknown, [*inspect.signature(self.__call__).parameters])
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        chosen = class_labels(self.transformer.config, classes)
        labels = torch.tensor(chosen).repeat_interleave(num_images)
        batches, generators = _batches(labels, generator, batch_size)
        steps, pictures = self.transformer.config.longest_sequence - 1, []
        with self.progress_bar(total=len(batches) * steps) as bar:
            for batch, one in zip(batches, generators, strict=True):
                _load_offloaded(self.transformer)
                codes = self.transformer.generate_images(
                    batch,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=one,
                    streamer=_Progress(bar),
                )
                pictures.extend(self._finished(codes, output_type))
        self.maybe_free_model_hooks()
        if output_type in ("pt", "latent"):
            images = torch.stack(pictures)
        else:
            images = np.stack(pictures) if output_type == "np" else pictures
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def class_label(self, wanted: str | int | None) -> int:
        """Number of a class, from its number or name. Of "tench, Tinca tinca" each part is a name.

        Raises:
            ValueError: if there is no such class, or several have this name.
        """
        return class_label(self.transformer.config, wanted)

    def _finished(self, codes: torch.Tensor, output_type: str):
        """Codes (B, h, w), or (B, Q, h, w), as what is asked for, B of them."""
        if output_type == "latent":
            return codes
        _load_offloaded(self.tokenizer)
        if codes.ndim == 3 and self.tokenizer.config.num_quantizers > 1:  # those of the first alone
            codes = codes[:, None]
        pixels = self.tokenizer.decode(
            image_codes=codes.to(running_device(self.tokenizer))
        ).pixel_values
        if output_type == "pil":
            return self.processor.post_process(pixels)
        if output_type == "np":
            pixels = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
            scaled = pixels * self.processor.image_std + self.processor.image_mean
            return scaled.clip(0, 1).astype(np.float32)
        return pixels


def _batches(labels: torch.Tensor, generator, batch_size: int) -> tuple[list, list]:
    """Labels (N,) in batches, and the generator of each."""
    if not isinstance(generator, (list, tuple)):
        batches = labels.split(batch_size)
        return batches, [generator] * len(batches)
    if len(generator) != len(labels):
        raise ValueError(
            f"generator is a list of {len(generator)} for {len(labels)} images: give one for each image"
        )
    return labels.split(1), list(generator)


def _load_offloaded(model: PreTrainedModel) -> None:
    # enable_model_cpu_offload brings a model to its device in forward, which is not what is called here.
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def _of_component(dtype, name: str):
    return (
        dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
    )


class _Progress(BaseStreamer):
    """Moves the bar by one for each step of a batch."""

    def __init__(self, bar):
        self.bar, self.prompt = bar, True

    def put(self, value) -> None:
        if self.prompt:  # generate first puts what it was given
            self.prompt = False
        else:
            self.bar.update()

    def end(self) -> None:
        pass
