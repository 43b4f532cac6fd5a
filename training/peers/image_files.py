"""Image file formats behind the face of a tokenizer: JPEG, WebP, AVIF, as Pillow writes them."""

import io

import torch
from PIL import Image, features
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from training.peers.face import ImageReconstruction, PeerConfig

# Name to Pillow's options beside the quality, between 0 and 100. Without `optimize` JPEG's tables are larger.
FORMATS = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {"speed": 6}}
FEATURES = {"JPEG": "jpg", "WebP": "webp", "AVIF": "avif"}


class ImageFile(nn.Module):
    """Writes images into files and reads them.

    Args:
        name: key of FORMATS.
        quality: between 0 and 100.
    """

    def __init__(self, name: str, quality: int):
        super().__init__()
        self.config = PeerConfig(name)
        self.options = {"format": name.upper(), "quality": quality, **FORMATS[name]}

    def forward(self, pixels: Tensor, num_quantizers: int | None = None) -> ImageReconstruction:
        """Write and read pixels (B, 3, H, W) in [-1, 1], rounded to 8 bits; `bits` are those of whole files."""
        rounded = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        files = [self.write(transforms.to_pil_image(image)) for image in rounded]
        decoded = torch.stack([_read(file, self.options["format"]) for file in files])
        bits = torch.tensor([8.0 * len(file) for file in files])
        return ImageReconstruction(
            decoded.to(pixels.device) / 127.5 - 1, bits=bits.to(pixels.device)
        )

    def write(self, image: Image.Image) -> bytes:
        """Return an image as the bytes of a file."""
        file = io.BytesIO()
        image.save(file, **self.options)
        return file.getvalue()

    def header_bits(self, side: int) -> int:
        """Return the bits of a file that holds a grey square and hence little but its header and tables."""
        return 8 * len(self.write(Image.new("RGB", (side, side), (128, 128, 128))))


def _read(file: bytes, form: str) -> Tensor:
    with Image.open(io.BytesIO(file), formats=[form]) as image:
        return transforms.pil_to_tensor(image.convert("RGB")).float()


def available(name: str) -> bool:
    """Tell whether Pillow was built with a format."""
    return bool(features.check(FEATURES[name]))
