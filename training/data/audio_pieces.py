"""The pieces of a compressed stream: what libsndfile would guess the length of, or not find at all.

Of an MP3 file without a Xing header the length is guessed from the first frames, which is wrong where the bit
rate changes; with one it is believed; and of streams that were joined, as both MP3 and Ogg allow, only the
first is read. Here the frames and pages are walked instead, which costs a tenth of decoding them.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

from training.data.file_views import FileView, file_size
from training.data.reader import UnreadableSample

# Bytes of a file that are looked at at once.
WINDOW = 1 << 18
# kbit/s by [version 1?][layer] and index (ISO 11172-3, 13818-3); 0 is a rate of one's own, which has no length.
BIT_RATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLING_RATES = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}
# libsndfile is told that a stream without a header is so much longer than it is: its guess, from the bit rate
# of the first frames, is then never too short (448 to 8 kbit/s, and there are frames of padding).
CLAIM = 64
# After audio that does not continue, frames are looked for over so many bytes: tags hold covers.
FURTHEST_FRAME = 1 << 24
# A file of more streams than this is refused: each is opened.
MOST_PIECES = 10_000


@dataclass(frozen=True)
class Piece:
    """A stretch of a file that is a recording of its own.

    Attributes:
        begin, end: in bytes.
        frames: samples of a channel, where they were counted; None where libsndfile's own number is right.
    """

    begin: int
    end: int
    frames: int | None = None

    def view(self, file: BinaryIO) -> FileView:
        """Return the piece as a file."""
        claimed = None if self.frames is None else (self.end - self.begin) * CLAIM
        return FileView(file, self.begin, self.end, claimed=claimed)


class _Window:
    """Small reads at rising places of a file."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end, self.first, self.content = file, end, 0, b""

    def read(self, place: int, count: int) -> bytes:
        """`count` bytes at a place, fewer at the end."""
        offset = place - self.first
        if offset < 0 or offset + count > len(self.content):
            self.file.seek(place)
            self.first, offset = place, 0
            self.content = self.file.read(max(0, min(max(WINDOW, count), self.end - place)))
        return self.content[offset : offset + count]


@dataclass(frozen=True)
class _Frame:
    size: int  # bytes
    samples: int
    stream: tuple  # what cannot change within a stream: version, layer, sampling rate, mono or not
    tag_at: int  # where a Xing header would stand


@lru_cache(4096)
def _frame(header: bytes) -> _Frame | None:
    """The MPEG audio frame that 4 bytes begin, if they do."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    rate, step, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer == 4 or rate in (0, 15) or step == 3:
        return None
    first, mono = version == 3, header[3] >> 6 == 3
    bits, frequency = BIT_RATES[first, layer][rate] * 1000, SAMPLING_RATES[version][step]
    samples = 384 if layer == 1 else 576 if layer == 3 and not first else 1152
    slot = 4 if layer == 1 else 1
    size = (samples // 8 // slot * bits // frequency + padding) * slot
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Frame(size, samples, (version, layer, frequency, mono), 4 + side)


def _tag_size(window: _Window, place: int) -> int:
    """Bytes of the tag (ID3, APE) or of the zeros that stand between or behind frames; 0 if there is none."""
    head = window.read(place, 32)
    if head.startswith(b"ID3") and len(head) >= 10:
        a, b, c, d = head[6:10]
        return 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
    if head.startswith(b"TAG"):
        return 128
    if head.startswith(b"APETAGEX") and len(head) == 32:
        size, flags = struct.unpack("<4xI4xI", head[8:24])
        return (
            size + 32 if flags & 1 << 29 else 32
        )  # of a footer alone, what it belongs to came before
    zeros = window.read(place, WINDOW)
    return len(zeros) - len(zeros.lstrip(b"\0"))


def _declared(window: _Window, place: int, frame: _Frame) -> int | None:
    """Frames that the header at `place` declares, -1 if it declares none; None if it is no header."""
    if frame.stream[1] != 3:
        return None
    content = window.read(place, min(frame.size, 64))
    tag = content[frame.tag_at :]
    if tag[:4] in (b"Xing", b"Info") and len(tag) >= 8:
        flags = int.from_bytes(tag[4:8], "big")
        return int.from_bytes(tag[8:12], "big") if flags & 1 and len(tag) >= 12 else -1
    if content[36:40] == b"VBRI":
        return -1  # it does declare them, but mpg123 does not believe it
    return None


def _declared_bytes(window: _Window, place: int, frame: _Frame) -> int:
    """Bytes of the stream that a Xing header at `place` declares, its own included; 0 if it declares none."""
    tag = window.read(place + frame.tag_at, 16)
    at = 12 if tag[7] & 1 else 8
    return int.from_bytes(tag[at : at + 4], "big") if tag[:4] != b"VBRI" and tag[7] & 2 else 0


def _next_frame(window: _Window, place: int) -> int | None:
    """Find the next two frames of one stream, or one that is the file's last."""
    for begin in range(place, min(window.end, place + FURTHEST_FRAME), WINDOW):
        content = window.read(begin, WINDOW + 4)
        at = content.find(b"\xff")
        while 0 <= at < WINDOW:
            frame = _frame(content[at : at + 4])
            if frame is not None:
                following = begin + at + frame.size
                after = _frame(window.read(following, 4))
                if following == window.end or (after and after.stream == frame.stream):
                    return begin + at
            at = content.find(b"\xff", at + 1)
    return None


def mpeg_pieces(file: BinaryIO, begin: int = 0, end: int | None = None) -> list[Piece]:
    """The streams of an MPEG audio file, every frame counted; [] for one of a free bit rate, which is constant.

    Raises:
        UnreadableSample: if the file was cut (it ends within a frame, or a header declares more frames than
            there are), or something that is neither a frame nor a tag stands between frames.
    """
    contained = end is not None
    end = file_size(file) if end is None else end
    window = _Window(file, end)
    place = begin
    while size := _tag_size(window, place):
        place += size
    place = _next_frame(window, place)
    if place is None:
        return []
    pieces = []
    while place is not None:
        piece, place = _stream(window, place, contained)
        if piece is not None:
            pieces.append(piece)
        _check_number(pieces)
        between = place
        while size := _tag_size(window, between):
            between += size
        place = None if between >= end else _next_frame(window, between)
        if place is not None and place != between:
            raise UnreadableSample(
                f"it is damaged at byte {between}: {place - between} are no frame"
            )
    return pieces


def _stream(window: _Window, begin: int, contained: bool) -> tuple[Piece | None, int]:
    """The stream that begins at a frame, and where it ends.

    Args:
        contained: whether a WAV file says how long it is, which may end within a frame.
    """
    first = _frame(window.read(begin, 4))
    declared = _declared(window, begin, first)
    place = sound = begin if declared is None else begin + first.size
    count = 0
    while True:
        frame = _frame(window.read(place, 4))
        if frame is None or frame.stream != first.stream or place + frame.size > window.end:
            break
        if frame.size >= 40 and _declared(window, place, frame) is not None:
            break
        place, count = place + frame.size, count + 1
    cut = frame is not None and place + frame.size > window.end  # within its last frame
    following = window.end if cut else place
    if declared == count + 1 and not cut:
        # Some encoders count the header too; otherwise the last frame is missing to the byte.
        cut = begin + _declared_bytes(window, begin, first) > window.end
    if declared is not None and declared > count + (not cut):
        raise UnreadableSample(f"it was cut: it ends after {count} of {declared} frames")
    if cut and declared != count and not contained:
        raise UnreadableSample("it was cut: it ends within a frame")
    if declared == count and count:
        return Piece(begin, place), following  # the header tells the encoder's delay too
    return (Piece(sound, place, count * first.samples) if count else None), following


def wav_stream(file: BinaryIO) -> tuple[int, int]:
    """Begin and end of the samples of a WAV file, in bytes: what is in it may be MP3."""
    size, place = file_size(file), 12
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            return place + 8, min(size, place + 8 + length)
        place += 8 + length + length % 2
    return size, size


def ogg_pieces(file: BinaryIO) -> list[Piece]:
    """The streams of an Ogg file that follow one another (RFC 3533, section 4).

    Raises:
        UnreadableSample: if the last page of one of them is not marked as such, or not whole: it was cut; or
            if the first page of one is missing.
    """
    window = _Window(file, file_size(file))
    starts, among_first, ended, begun = [0], True, True, set()
    for place, head, ends in _ogg_pages(window):
        begins, serial = bool(head[5] & 2), head[14:18]
        if begins and not among_first:
            starts.append(place)
            if not ended:
                break
        if begins:
            begun.add(serial)
        elif serial not in begun:
            raise UnreadableSample(
                f"it is damaged before byte {place}: a stream lacks its first page"
            )
        _check_number(starts)
        among_first, ended = begins, ends
    if not ended:
        raise UnreadableSample("it was cut: the last page of its stream is missing")
    return [Piece(a, b) for a, b in zip(starts, [*starts[1:], window.end], strict=True)]


def _ogg_pages(window: _Window) -> Iterator[tuple[int, bytes, bool]]:
    """Places and heads of the pages, and whether they end a stream; what lies between pages is passed over."""
    place = 0
    while place + 27 <= window.end:
        head = window.read(place, 27 + 255)
        if not head.startswith(b"OggS"):
            found = window.read(place + 1, WINDOW).find(b"OggS")
            place += WINDOW - 3 if found < 0 else found + 1
            continue
        begin, place = place, place + 27 + head[26] + sum(head[27 : 27 + head[26]])
        yield begin, head, bool(head[5] & 4) and place <= window.end


def _check_number(pieces: list) -> None:
    if len(pieces) > MOST_PIECES:
        raise UnreadableSample(f"it consists of more than {MOST_PIECES:,} streams")
