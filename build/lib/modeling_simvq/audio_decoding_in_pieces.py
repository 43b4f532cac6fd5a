"""Part of the audio model that decodes long clips piece by piece, cross-faded."""

import torch
from torch import Tensor

from .tiling import CrossFade


class DecodesInPieces:
    """Mixin of the audio model. Uses its `config` and `decoder`."""

    _decoder_chunks: tuple[int, int] | None = None

    def enable_chunking(self, chunk_seconds: float = 20.0, overlap_seconds: float = 2.0) -> None:
        """Decode long clips chunk by chunk (inference only), so that memory and time grow linearly.

        Attention and norms of the decoder then see one chunk instead of the whole clip, so the result
        differs a little; chunks are cross-faded over their overlap. Encoding needs no such thing: it
        always runs in chunks and gives exactly the codes of the whole clip.

        Args:
            chunk_seconds: length of a chunk; shorter clips are not cut.
            overlap_seconds: shared by neighbouring chunks, at most half a chunk.
        """
        chunk, overlap = (
            round(seconds * self.config.frame_rate) for seconds in (chunk_seconds, overlap_seconds)
        )
        if not 0 < overlap <= chunk // 2:
            raise ValueError(
                "overlap_seconds must be at least one frame and at most half of chunk_seconds, "
                f"got overlap_seconds={overlap_seconds} and chunk_seconds={chunk_seconds}"
            )
        self._decoder_chunks = (chunk, overlap)

    def disable_chunking(self) -> None:
        """Decode every clip whole again."""
        self._decoder_chunks = None

    def _decode_in_chunks(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Cut each clip by its own length, as if it were alone; a chunk holds only clips that reach it."""
        chunk, overlap = self._decoder_chunks
        batch, _, frames = latents.shape
        hop = self.config.hop_length
        lengths = [frames] * batch if mask is None else mask.sum(dim=-1).flatten().tolist()
        ends = torch.tensor(lengths, device=latents.device)[:, None, None] * hop
        faded = CrossFade((batch, 1, frames * hop), overlap * hop, latents.device)
        for start in range(0, frames - overlap, chunk - overlap):
            # What is left of a clip after a chunk is more than the overlap, or nothing.
            rows = [
                row for row, length in enumerate(lengths) if length > start + overlap * (start > 0)
            ]
            if not rows:
                break
            stop = min(start + chunk, max(lengths[row] for row in rows))
            within = None if mask is None else mask[rows, :, start:stop]
            piece = self.decoder(latents[rows, :, start:stop].contiguous(), within)
            faded.add(piece, [start * hop], rows, ends[rows])
        return faded.result().to(latents.dtype)
