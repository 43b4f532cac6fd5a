"""Lengths that headers declare: files that were cut are refused, headers that were never finished mended.

A writer that cannot move back leaves 0, -1 or the most that there can be: such a file is read to its end.
Any other length behind the end of the file tells that the file was cut. libsndfile takes both for shorter
files, but believes a header that declares too little. Here such a length is found, and what the file really
holds is put in its place.
"""

import re
import struct
from typing import BinaryIO

from training.data.file_views import file_size
from training.data.reader import UnreadableSample

# What may follow the samples though no chunk says so: a tag, such as the 128 bytes of ID3v1.
MOST_TRAILING_BYTES = 4096
# Kind of file to its first chunk's place, the layout of a chunk's head, the bytes that sizes are rounded up to,
# and the chunks of samples.
CHUNKED = {
    b"RIFF": (12, "<4sI", 2, (b"data",)),
    b"RF64": (12, "<4sI", 2, (b"data",)),
    b"RIFX": (12, ">4sI", 2, (b"data",)),
    b"FORM": (12, ">4sI", 2, (b"SSND", b"BODY")),
    b"caff": (8, ">4sq", 1, (b"data",)),
}
# What writers to a pipe declare: the most that 32 or 64 bits hold, signed or not, less their header or a part
# of a block (FFmpeg, LAME, opusdec, arecord; SoX 0x7FFFF000), and SoX's 0x7F000000 in AIFF.
PLACEHOLDERS = (2**31, 2**32, 2**63, 2**64)
SOX_PLACEHOLDER = 0x7F000000
MOST_BESIDE = 1 << 16
# The last frame of a FLAC file begins in so many bytes from the end, unless large tags follow it.
FLAC_TAIL = 1 << 17
FLAC_BLOCKS = (
    {1: 192} | {i: 576 << i - 2 for i in range(2, 6)} | {i: 256 << i - 8 for i in range(8, 16)}
)
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def mended_header(file: BinaryIO, whole: bool) -> dict[int, bytes]:
    """Place in the file to the bytes that its header should have there; {} if it tells the truth.

    Where nothing is returned for WAV (also RIFX, RF64), AIFF, CAF, AU and FLAC, their number of samples is
    certain; of W64 and NIST, that the file was not cut. Only headers of chunks are read, and the last 128 KB of
    FLAC.

    Args:
        whole: whether all of the recording will be read; of FLAC a second file is then looked for everywhere.

    Raises:
        UnreadableSample: if the file was cut, or a second one was joined to it.
    """
    size = file_size(file)
    kind = file.read(4)
    if kind == b"riff":
        return _wave64(file, size)
    if kind == b"NIST":
        _check_nist(file, size)
        return {}
    if kind in CHUNKED:
        return _chunked(file, size, kind)
    if kind in (b".snd", b"dns."):
        order = ">" if kind == b".snd" else "<"
        start, length = struct.unpack(order + "II", file.read(8).ljust(8, b"\0"))
        end = start + length
        _check_end(start, length, size)
        if end > size or end < size and _goes_on(file, end, size, length, kind):
            return {8: struct.pack(order + "I", 2**32 - 1)}
        return {}
    return _flac(file, size, whole)


def _chunked(file: BinaryIO, size: int, kind: bytes) -> dict[int, bytes]:
    place, head, even, wanted = CHUNKED[kind]
    width = struct.calcsize(head)

    def chunk(at: int) -> tuple[bytes, int]:
        file.seek(at)
        content = file.read(width)
        return struct.unpack(head, content) if len(content) == width else (b"", -1)

    field, layout = None, head[0] + head[-1]
    while (found := chunk(place))[0] not in wanted:
        name, length = found
        if length < 0:
            return {}
        if name == b"ds64":  # RF64: the length is here, 64 bits of it
            field = place + 16
        place += width + length + -length % even
    start, length = place + width, found[1]
    if field is not None and length == 2**32 - 1:
        file.seek(field)
        layout, (length,) = "<Q", struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    else:
        field = place + 4
    if length >= 0 and start + length >= size:
        _check_end(start, length, size)
        # libsndfile takes 32 bits of them for what they are, and loses itself in 64.
        return {field: struct.pack(layout, size - start)} if layout == "<Q" else {}
    end = start + max(0, length)
    for after in {end + -length % even, end}:  # some writers forget to round
        name, following = chunk(after)
        is_chunk = name != kind and re.fullmatch(rb"[\w ]{4}", name)
        if is_chunk and 0 <= following <= size - after - width:
            return {}
    if length >= 0 and not _goes_on(file, end, size, length, kind):
        return {}
    most = 2 ** (8 * struct.calcsize(layout) - (layout[-1] == "q")) - 1
    return {field: struct.pack(layout, min(most, size - start))}


def _check_end(start: int, length: int, size: int) -> None:
    """Raise UnreadableSample if a declared length tells that the file was cut.

    Args:
        start, length: of the samples, in bytes.
        size: of the file.
    """
    if start + length <= size or _is_placeholder(length):
        return
    if length in (size, size - 8):  # a writer that counted its header among the samples
        return
    raise UnreadableSample(
        f"it was cut: it ends {start + length - size:,} bytes before its header says"
    )


def _is_placeholder(length: int) -> bool:
    return 0 <= length - SOX_PLACEHOLDER < MOST_BESIDE or any(
        abs(most - length) <= MOST_BESIDE for most in PLACEHOLDERS
    )


def _wave64(file: BinaryIO, size: int) -> dict[int, bytes]:
    """Mend the header of a W64 file, whose chunks have names of 16 bytes and count their heads."""
    place = 40
    while place + 24 <= size:
        file.seek(place)
        name, length = struct.unpack("<4s12xQ", file.read(24))
        if name == b"data":
            _check_end(place + 24, max(0, length - 24), size)
            return {place + 16: struct.pack("<Q", size - place)} if place + length > size else {}
        place += max(24, length + -length % 8)
    return {}


def _check_nist(file: BinaryIO, size: int) -> None:
    """Check the length of a NIST SPHERE file, whose header is text."""
    file.seek(0)
    head = file.read(1 << 14)
    fields = dict(re.findall(rb"^(\w+) -i (\d+)\s*$", head, re.MULTILINE))
    start = re.match(rb"NIST_1A\s+(\d+)\s", head)
    wanted = (b"sample_count", b"sample_n_bytes")
    # Of samples that are compressed the number tells nothing; libsndfile does not read these.
    if start and all(name in fields for name in wanted) and b"embedded" not in head:
        count, width = (int(fields[name]) for name in wanted)
        _check_end(int(start[1]), count * width * int(fields.get(b"channel_count", 1)), size)


def _goes_on(file: BinaryIO, end: int, size: int, length: int, kind: bytes) -> bool:
    """Tell whether there are samples behind the end that the header declares."""
    file.seek(end)
    content = file.read(MOST_TRAILING_BYTES + 1)
    if content.startswith(kind):
        raise _joined()
    if length == 0:
        return size > end
    return len(content) > MOST_TRAILING_BYTES and content.strip(b"\0") != b""


def _joined() -> UnreadableSample:
    return UnreadableSample("it is two files, one behind the other: take them apart")


def _flac(file: BinaryIO, size: int, whole: bool) -> dict[int, bytes]:
    """Return a header of unknown length for a FLAC file that continues behind its declared length."""
    file.seek(0)
    content = file.read(1 << 16)
    first = FLAC_START.search(content)
    if first is None or not (content.startswith((b"fLaC", b"ID3"))):
        return {}
    info = content[first.end() : first.end() + 34]
    if len(info) < 34:
        return {}
    total = int.from_bytes(info[13:18], "big") & 2**36 - 1
    begin = first.end() if whole else max(first.end(), size - FLAC_TAIL)
    if _second_flac(file, begin, size):
        raise _joined()
    file.seek(max(first.end(), size - FLAC_TAIL))
    end = _flac_end(file.read(FLAC_TAIL), info)
    largest = int.from_bytes(info[7:10], "big")  # frame, in bytes; 0 if the writer did not tell
    if end is not None and end < total and 0 < largest <= FLAC_TAIL - MOST_TRAILING_BYTES:
        raise UnreadableSample(f"it was cut: it ends before its header says, {total:,} samples")
    if total == 0 or end is None or end <= total:
        return {}
    at = first.end() + 13
    return {at: bytes([info[13] & 0xF0]) + bytes(4)}


def _second_flac(file: BinaryIO, begin: int, end: int) -> bool:
    overlap = b""
    for place in range(begin, end, 1 << 20):
        file.seek(place)
        content = overlap + file.read(min(1 << 20, end - place))
        if FLAC_START.search(content):
            return True
        overlap = content[-7:]
    return False


def _flac_end(tail: bytes, info: bytes) -> int | None:
    """Return where the last frame that begins in `tail` ends, in samples; None if none begins there."""
    block, total = int.from_bytes(info[:2], "big"), int.from_bytes(info[13:18], "big") & 2**36 - 1
    last = None
    for found in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", tail))):
        end = _flac_frame_end(tail[found.start() : found.start() + 16], block)
        last = end if last is None else last
        # Samples may look like a frame's header: a file is cut only if no frame reaches its declared end.
        if end is not None and end >= total:
            return end
    return last


def _flac_frame_end(header: bytes, block: int) -> int | None:
    """The last sample of the frame that a header begins (RFC 9639, section 9.1), if it is one.

    Args:
        header: 16 bytes from its first, fewer at the end of the file.
        block: samples of a frame, where all but the last have the same.
    """
    if len(header) < 6 or header[3] & 1:
        return None
    ones = 8 - (~header[4] & 0xFF).bit_length()  # leading ones: bytes of the number, as in UTF-8
    if ones == 1 or ones > 7:
        return None
    place, number = 5, header[4] & (0x7F >> ones)
    for byte in header[5 : 4 + ones]:
        if byte >> 6 != 2:
            return None
        place, number = place + 1, number << 6 | byte & 0x3F
    code, rate = header[2] >> 4, header[2] & 15
    more = code - 5 if code in (6, 7) else 0
    samples = (
        int.from_bytes(header[place : place + more], "big") + 1 if more else FLAC_BLOCKS.get(code)
    )
    place += more + (1 if rate == 12 else 2 if rate in (13, 14) else 0)
    if (
        samples is None
        or rate == 15
        or place >= len(header)
        or _crc8(header[:place]) != header[place]
    ):
        return None
    return (number if header[1] & 1 else number * block) + samples


def _crc8(content: bytes) -> int:
    register = 0
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register << 1 ^ 7 if register & 128 else register << 1) & 255
    return register
