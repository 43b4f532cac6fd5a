"""Image tokenizers inside multimodal models of transformers: Emu3's and Janus's."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from modeling_simvq.nearest_code import nearest_code
from training.peers.face import ImageReconstruction, Peer, PeerConfig
from training.runtime.pretrained import load_pretrained

# Chameleon's is only the encoder there.
WITHOUT_DECODER = ("chameleon", "chameleon_vqgan")


class Emu3Peer(Peer):
    """Gives Emu3's tokenizer the face of SimVQImageModel.

    It is one of video; of an image it takes four equal frames, makes one map of codes, and shows the first of
    the four frames that it decodes.
    """

    def __init__(self, model):
        config = model.config
        factor = 2 ** (len(config.channel_multiplier) - 1)
        super().__init__(model, PeerConfig("Emu3", config.codebook_size, downsample_factor=factor))

    def forward(self, pixels: Tensor, num_quantizers: int | None = None) -> ImageReconstruction:
        """Encode and decode pixels (B, 3, H, W) in [-1, 1]."""
        self.count(num_quantizers)
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        codes = torch.stack(self.model.encode(pixels, image_sizes=sizes).image_tokens)
        return ImageReconstruction(self.model.decode(codes), codes)


class JanusPeer(Peer):
    """Gives Janus's tokenizer the face of SimVQImageModel.

    Its decoder brings codes to length 1, and the search of its authors does so first (VectorQuantizer in
    janus/models/vq_model.py of their repository); that of transformers' encode does not, and finds other codes.
    Here they are searched as the authors do it.
    """

    def __init__(self, model):
        config = model.config
        factor = 2 ** (len(config.channel_multiplier) - 1)
        facts = PeerConfig(
            "Janus",
            config.num_embeddings,
            downsample_factor=factor,
            resolution=config.num_patches * factor,
        )
        super().__init__(model, facts)

    def forward(self, pixels: Tensor, num_quantizers: int | None = None) -> ImageReconstruction:
        """Encode and decode pixels (B, 3, H, W) in [-1, 1]."""
        self.count(num_quantizers)
        latents = self.model.quant_conv(self.model.encoder(pixels)).movedim(1, -1)
        rows, vectors = latents.flatten(0, 2), self.model.quantize.embedding.weight
        codes = nearest_code(F.normalize(rows, dim=-1), F.normalize(vectors, dim=-1))
        codes = codes.view(latents.shape[:3])
        # It would decode no other number of codes than the one it was trained with.
        self.model.quantize.quant_state_dims = list(codes.shape[1:])
        return ImageReconstruction(self.model.decode(codes.flatten(1)), codes)


def open_multimodal(kind: str, name: str) -> Peer:
    """Load the image tokenizer of a multimodal model: saved by itself, or taken out of the whole.

    Args:
        kind: key of MULTIMODAL.
        name: folder, or name on the Hub.
    """
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model_class = {Emu3Peer: Emu3VQVAE, JanusPeer: JanusVQVAE}[MULTIMODAL[kind]]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or it would list all the tensors of the language model
    try:
        model = load_pretrained(
            model_class,
            name,
            config=getattr(config, "vq_config", config),
            key_mapping={r"^(model\.)?vqmodel\.": ""},
            dtype=torch.float32,
        )
    finally:
        logging.set_verbosity(verbosity)
    return MULTIMODAL[kind](model)


MULTIMODAL = {
    "emu3": Emu3Peer,
    "emu3_vqgan": Emu3Peer,
    "janus": JanusPeer,
    "janus_vqgan": JanusPeer,
}
