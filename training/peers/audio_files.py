"""Opus behind the face of a tokenizer, as libsndfile writes it, which comes with the package soundfile."""

import io

import soundfile
import torch
from torch import Tensor, nn

from training.peers.face import AudioReconstruction, PeerConfig

RATES = (8000, 12_000, 16_000, 24_000, 48_000)  # samples per second that Opus takes
# libsndfile's compression level, from 0 to 1, is one of these bit rates of a channel, in kbit/s.
MOST, LEAST = 256.0, 6.0
HEADER, SEGMENTS = (
    27,
    26,
)  # of an Ogg page: its fixed length, and where the number of segments stands


class OpusFile(nn.Module):
    """Writes recordings into Ogg Opus files and reads them.

    Args:
        kilobits: a second, between 6 and 256; Opus spends more or less from moment to moment.
        sampling_rate: of the recordings in Hz; taken is the next of RATES.
    """

    def __init__(self, kilobits: float, sampling_rate: int):
        super().__init__()
        rate = min((rate for rate in RATES if rate >= sampling_rate), default=RATES[-1])
        self.config = PeerConfig("Opus", sampling_rate=rate)
        self.level = (MOST - kilobits) / (MOST - LEAST)

    def forward(self, samples: Tensor, num_quantizers: int | None = None) -> AudioReconstruction:
        """Write and read samples (1, 1, L) in [-1, 1]; `bits` are those of the packets, without Ogg's pages."""
        rate, file = self.config.sampling_rate, io.BytesIO()
        waveform = samples[0, 0].cpu().numpy()
        soundfile.write(
            file, waveform, rate, format="OGG", subtype="OPUS", compression_level=self.level
        )
        bits = 8.0 * packet_bytes(file.getvalue())
        file.seek(0)
        decoded, found = soundfile.read(file, dtype="float32")
        if found != rate:
            raise ValueError(f"Opus was written at {rate} Hz and read at {found} Hz")
        values = torch.from_numpy(decoded[: len(waveform)])[None, None].to(samples.device)
        return AudioReconstruction(values, bits=torch.tensor([bits]))


def packet_bytes(file: bytes) -> int:
    """Return the length of the sound in an Ogg file: of the packets on all pages that are not headers.

    Source: RFC 3533, section 6; RFC 7845, section 3: pages of the two headers have granule position 0.
    """
    position = total = 0
    while position < len(file):
        table = file[position + HEADER : position + HEADER + file[position + SEGMENTS]]
        body = sum(table)
        if any(file[position + 6 : position + 14]):
            total += body
        position += HEADER + len(table) + body
    return total


def available() -> bool:
    """Tell whether libsndfile was built with Opus."""
    return "OPUS" in soundfile.available_subtypes("OGG")
