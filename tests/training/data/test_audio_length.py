"""Recordings whose length libsndfile guesses, or takes from a header: all is read, or the file is named."""

import io
import struct
from contextlib import closing

import numpy as np
import pytest
import soundfile
import torch

from tests.training.support.dirty_files import _flac_declaring, recording, wav
from tests.training.support.recordings import encoded, noise
from training.data.audio_file import AudioFile
from training.data.audio_pieces import _frame
from training.data.reader import UnreadableSample
from training.data.recordings import decode_audio

RATE = 24_000
LOUD, QUIET = (noise(3 * RATE) * 3).clip(-0.9, 0.9), np.zeros(3 * RATE, np.float32)


def mp3(samples: np.ndarray, rate: int = RATE) -> bytes:
    """Of varying bit rate, with a Xing header."""
    buffer = io.BytesIO()
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.3}
    soundfile.write(buffer, samples, rate, format="MP3", **options)
    return buffer.getvalue()


def frames(content: bytes) -> list[bytes]:
    found = []
    while content:
        size = _frame(content[:4]).size
        found.append(content[:size])
        content = content[size:]
    return found


def headless(samples: np.ndarray, rate: int = RATE) -> bytes:
    return b"".join(frames(mp3(samples, rate))[1:])


def with_count(content: bytes, count: int) -> bytes:
    at = content.find(b"Xing") + 8
    return content[:at] + struct.pack(">I", count) + content[at + 4 :]


def decoded(content: bytes, clip: int | None = None, rate: int = RATE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return decode_audio({"bytes": content, "path": None}, rate, clip, generator)[0]


def is_in(crop: torch.Tensor, whole: torch.Tensor) -> bool:
    return len(crop) > 0 and crop.numpy().tobytes() in whole.numpy().tobytes()


@pytest.mark.parametrize("order", ["loud first", "quiet first"])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_mp3_of_varying_bit_rate_without_a_header(order, rate):
    """The guess of libsndfile is too long where silence comes first, and far too short where it comes last."""
    parts = [LOUD, QUIET] if order == "loud first" else [QUIET, LOUD]
    content = mp3(np.concatenate(parts), rate)
    count, samples = len(frames(content)) - 1, 1152 if rate == 44_100 else 576
    whole = decoded(headless(np.concatenate(parts), rate), rate=rate)
    assert len(whole) == count * samples
    wanted = decoded(content, rate=rate)  # what its header lets begin after the encoder's delay
    assert len(wanted) == 6 * RATE and is_in(wanted, whole)
    crop = decoded(headless(np.concatenate(parts), rate), 9_000, rate)
    assert is_in(crop, whole)


def test_joined_mp3s_are_read_to_the_end():
    first, second = mp3(LOUD), mp3(LOUD[:RATE])
    tag = b"ID3\4\0\0" + bytes([0, 0, 1, 0]) + bytes(128)
    wanted = torch.cat([decoded(first), decoded(second)])
    for between in (b"", tag, b"TAG" + bytes(125), bytes(500)):
        assert torch.equal(decoded(tag + first + between + second + tag), wanted)
    assert len(decoded(headless(LOUD) + headless(QUIET))) == 576 * (len(frames(first)) * 2 - 2)
    stereo = mp3(np.stack([LOUD, LOUD], axis=1))
    assert len(decoded(first + stereo)) == 2 * len(LOUD)
    with pytest.raises(UnreadableSample, match="sampling rates of 24000 and 16000 Hz"):
        decoded(first + mp3(LOUD, 16_000))


def test_a_count_in_an_mp3_header_is_checked():
    content = mp3(LOUD)
    count = len(frames(content)) - 1
    assert len(decoded(content)) == len(LOUD)
    for wrong in (count // 4, count + 1):
        assert len(decoded(with_count(content, wrong))) == count * 576
    last = len(frames(content)[-1])
    cut = [(count, content[:end]) for end in (len(content) // 2, -last, 1 - last, -1)]
    for wrong, there in ((count + 2, content), *cut):
        with pytest.raises(UnreadableSample, match="ends after"):
            decoded(with_count(there, wrong))
        with pytest.raises(UnreadableSample, match="ends after"):
            decoded(with_count(there, wrong), 1_000)


def test_damage_between_mp3_frames_is_named():
    pieces = frames(mp3(LOUD))[1:]
    spoilt = b"".join(pieces[:50]) + b"damage" * 50 + b"".join(pieces[50:])
    with pytest.raises(UnreadableSample, match="damaged at byte"):
        decoded(spoilt)
    end = b"".join(pieces)
    with pytest.raises(UnreadableSample, match="cut: it ends within a frame"):
        decoded(end[:-20])
    for behind in (b"TAG" + bytes(125), bytes(500), b"APETAGEX" + bytes(24)):
        assert torch.equal(decoded(end + behind), decoded(end))


def test_mp3_in_a_wav_file():
    content = headless(np.concatenate([LOUD, QUIET]))
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 8000, 1, 0, 12, 1, 2, 576, 1, 0x571)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(content)) + content + b"LIST\4\0\0\0INFO"
    whole = decoded(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    assert torch.equal(whole, decoded(content)) and len(whole) > 6 * RATE


@pytest.mark.slow
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_streams_are_read_to_the_end(subtype):
    parts = [encoded(x, RATE, "OGG", subtype) for x in (LOUD, LOUD[:RATE], LOUD)]
    alone = [decoded(part) for part in parts]
    assert torch.equal(decoded(b"".join(parts)), torch.cat(alone))
    assert [len(x) for x in alone] == [3 * RATE, RATE, 3 * RATE]
    assert torch.equal(decoded(parts[0]), alone[0])
    crop = decoded(b"".join(parts), 6 * RATE)
    assert is_in(crop, torch.cat(alone))
    assert torch.equal(
        decoded(parts[0] + b"TAG" + bytes(125)), alone[0]
    )  # as some programs append it
    for cut in (parts[0][:-1], parts[0][: parts[0].rfind(b"OggS")], parts[0][:-5000] + parts[1]):
        for clip in (None, 1_000):
            with pytest.raises(UnreadableSample, match="cut: the last page|lacks its first page"):
                decoded(cut, clip)


def put(content: bytes, mark: bytes, offset: int, layout: str, value: int) -> bytes:
    at = content.find(mark) + offset
    new = struct.pack(layout, value)
    return content[:at] + new + content[at + len(new) :]


def unfinished() -> dict[str, bytes]:
    """Headers that their writers could not finish, or that declare too little, of files of three seconds."""
    samples = (LOUD * 32_768).astype("<i2").tobytes()
    kinds = {kind: recording(LOUD, RATE, kind) for kind in ("AIFF", "AU", "CAF", "RF64", "W64")}
    huge = (0, 2**32 - 1, 2**32 - 37, 2**31 - 1, 2**31 - 37, 2**31, 0x7FFFF000)
    header = len(wav(samples, declared=0)) - len(samples)
    huge += (
        len(samples) + header,
        len(samples) + header - 8,
    )  # writers that count their header too
    files = {f"{n:#x}.wav": wav(samples, declared=n) for n in huge}
    files["half.wav"] = wav(samples, declared=len(samples) // 2)
    files["none.wav"] = b"RIFF\0\0\0\0" + wav(samples, declared=0)[8:]
    files["list.wav"] = wav(samples, declared=len(samples)) + b"LIST\x0a\0\0\0INFO" + b"x" * 6
    files["tag.wav"] = wav(samples, declared=len(samples)) + b"TAG" + b"x" * 125
    for value in (0, 2**32 - 1, 0x7F000008, 30_000):
        files[f"{value:#x}.aiff"] = put(kinds["AIFF"], b"SSND", 4, ">I", value)
        files[f"{value:#x}.au"] = put(kinds["AU"], b".snd", 8, ">I", value)
    for value in (0, -1, 30_000):
        files[f"{value}.caf"] = put(kinds["CAF"], b"data", 4, ">q", value)
    for value in (0, 30_000, 2**63 - 1, 2**64 - 1):
        files[f"{value}.rf64"] = put(kinds["RF64"], b"ds64", 16, "<Q", value)
        files[f"{value}.w64"] = put(kinds["W64"], b"data", 16, "<Q", value)
    for value in (0, 1_000, RATE):
        files[f"{value}.flac"] = _flac_declaring(LOUD, value)
    return files


@pytest.mark.parametrize("name", list(unfinished()))
def test_headers_that_were_never_finished(name):
    content = unfinished()[name]
    whole = decoded(content)
    assert len(whole) == len(LOUD)
    assert torch.allclose(whole, torch.from_numpy(LOUD), atol=2 / 32_768)
    crop = decoded(content, 2 * RATE)
    assert is_in(crop, whole)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "CAF", "RF64", "FLAC"])
def test_joined_files_of_other_formats_are_named(kind):
    one = recording(LOUD[:RATE], RATE, kind)
    for clip in (None, 1_000):
        with pytest.raises(UnreadableSample):
            decoded(one + one, clip)


def whole_files() -> dict[str, bytes]:
    kinds = [
        "WAV",
        "WAVEX",
        "AIFF",
        "AU",
        "CAF",
        "W64",
        "RF64",
        "NIST",
        "SVX",
        "FLAC",
        "OGG",
        "MP3",
    ]
    files = {kind: encoded(LOUD, RATE, kind) for kind in kinds}
    files |= {f"WAV {kind}": encoded(LOUD, RATE, "WAV", kind) for kind in ("FLOAT", "IMA_ADPCM")}
    files |= {"OPUS": encoded(LOUD, RATE, "OGG", "OPUS"), "MP3 varying": mp3(LOUD)}
    odd = recording(
        LOUD[:-1], RATE, "WAV", "PCM_U8"
    )  # without the byte that would make the chunk even
    return files | {"odd WAV": odd[: 44 + len(LOUD) - 1]}


@pytest.mark.parametrize("name", list(whole_files()))
def test_recordings_that_were_cut_are_named(name):
    """Whatever part of them a crop needs; and the same files whole are taken."""
    content = whole_files()[name]
    length = len(decoded(content))
    assert len(LOUD) - 1 <= length <= len(LOUD) + (2_000 if "ADPCM" in name else 0)
    for part in (0.999, 0.99, 0.5, 0.1):
        for clip in (None, 1_000):
            if name == "FLAC" and part > 0.9 and clip:
                continue  # cut within its last frame, which this crop does not need
            with pytest.raises(UnreadableSample, match=r"cut|lost sync|malformed"):
                decoded(content[: int(len(content) * part)], clip)


@pytest.mark.parametrize("kind", ["RF64", "W64", "WAV", "AU", "AIFF"])
def test_lengths_behind_the_end_of_the_file_are_those_of_a_cut_one(kind):
    content = recording(LOUD, RATE, kind)
    mark, offset, layout = {
        "RF64": (b"ds64", 16, "<Q"),
        "W64": (b"data", 16, "<Q"),
        "WAV": (b"data", 4, "<I"),
        "AU": (b".snd", 8, ">I"),
        "AIFF": (b"SSND", 4, ">I"),
    }[kind]
    for value in (4 * len(LOUD), 10**9, 3 * 10**9):
        with pytest.raises(UnreadableSample, match="cut"):
            decoded(put(content, mark, offset, layout, value))


@pytest.mark.parametrize("cut", [0.99, 0.5, 0.1])
def test_a_cut_flac_of_unknown_length_is_named(cut):
    content = _flac_declaring(LOUD, 0)
    with pytest.raises(UnreadableSample, match="lost sync"):
        decoded(content[: int(len(content) * cut)], 1_000)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "IMA_ADPCM", "ULAW"])
def test_wav_that_cannot_be_moved_in(subtype):
    content = encoded(LOUD, RATE, "WAV", subtype)
    whole = decoded(content)
    assert len(LOUD) <= len(whole) <= len(LOUD) + 2_000  # whole blocks
    crop = decoded(content, RATE)
    assert is_in(crop, whole)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF"])
def test_a_crop_of_a_long_recording_reads_little_of_the_file(kind):
    """Ten minutes: the length is certain without reading them."""
    content = recording(np.tile(LOUD, 200), RATE, kind)

    class Counted(io.BytesIO):
        count = 0

        def readinto(self, buffer):
            Counted.count += len(buffer)
            return super().readinto(buffer)

        def read(self, size=-1):
            found = super().read(size)
            Counted.count += len(found)
            return found

    with closing(AudioFile(Counted(content), whole=False)) as file:
        assert file.frames == 200 * len(LOUD)
        assert len(file.read(10**7, 10**7 + RATE)) == RATE
    assert Counted.count < 2_000_000 < len(content) / 10
