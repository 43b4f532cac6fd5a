"""Image tokenizers of diffusers: VQModel, and AutoencoderKL, which is continuous."""

import torch
from torch import Tensor

from training.peers.face import ImageReconstruction, Peer, PeerConfig
from training.runtime.pretrained import load_pretrained


class VQModelPeer(Peer):
    """Gives diffusers' VQModel the face of SimVQImageModel; images are decoded from the codes alone.

    Args:
        low, high: pixel values that the model was trained on; aMUSEd's are 0 and 1.
    """

    def __init__(self, model, low: float = -1.0, high: float = 1.0):
        config = model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        facts = PeerConfig("VQModel", config.num_vq_embeddings, downsample_factor=factor)
        super().__init__(model, facts)
        self.low, self.high = low, high

    def forward(self, pixels: Tensor, num_quantizers: int | None = None) -> ImageReconstruction:
        """Encode and decode pixels (B, 3, H, W) in [-1, 1]."""
        self.count(num_quantizers)
        latents = self.model.encode(to_range(pixels, self.low, self.high)).latents
        size, codes = latents.shape[-2:], self.model.quantize(latents)[2][2]
        shape = (len(pixels), *size, self.model.quantize.vq_embed_dim)
        vectors = codes
        if not self.model.config.lookup_from_codebook:
            vectors = self.model.quantize.get_codebook_entry(codes, shape)
        decoded = self.model.decode(vectors, force_not_quantize=True, shape=shape).sample
        return ImageReconstruction(
            from_range(decoded, self.low, self.high), codes.view(len(pixels), *size)
        )


class AutoencoderKLPeer(Peer):
    """Gives diffusers' AutoencoderKL the face of SimVQImageModel, without codes: its latents are continuous."""

    def __init__(self, model, low: float = -1.0, high: float = 1.0):
        config = model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        note = (
            f"AutoencoderKL: {config.latent_channels} numbers for {factor} x {factor} pixels, the mode of the "
            "posterior; they are no discrete code, so there are no bits per pixel and no utilisation."
        )
        super().__init__(model, PeerConfig("AutoencoderKL", downsample_factor=factor, note=note))
        self.low, self.high = low, high

    def forward(self, pixels: Tensor, num_quantizers: int | None = None) -> ImageReconstruction:
        """Encode and decode pixels (B, 3, H, W) in [-1, 1]."""
        self.count(num_quantizers)
        posterior = self.model.encode(to_range(pixels, self.low, self.high)).latent_dist
        decoded = self.model.decode(posterior.mode()).sample
        return ImageReconstruction(from_range(decoded, self.low, self.high))


def to_range(pixels: Tensor, low: float, high: float) -> Tensor:
    """Map [-1, 1] onto [low, high]."""
    return (pixels + 1) / 2 * (high - low) + low


def from_range(pixels: Tensor, low: float, high: float) -> Tensor:
    """Map [low, high] onto [-1, 1]."""
    return (pixels - low) / (high - low) * 2 - 1


def open_diffusers(
    class_name: str, name: str, subfolder: str | None, pixel_range: tuple[float, float]
) -> Peer:
    """Load an image tokenizer of diffusers.

    Args:
        class_name: key of DIFFUSERS.
        name: folder, or name on the Hub.
        subfolder: of a pipeline, the part's.
        pixel_range: lowest and highest pixel value that it was trained on.
    """
    import diffusers

    model = load_pretrained(
        getattr(diffusers, class_name), name, subfolder=subfolder, torch_dtype=torch.float32
    )
    return DIFFUSERS[class_name](model, *pixel_range)


DIFFUSERS = {"VQModel": VQModelPeer, "AutoencoderKL": AutoencoderKLPeer}
