"""What folders of pictures and of recordings really hold: odd files that are sound, and broken ones."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import soundfile
from PIL import Image

SIDE = 48
RED, GREEN, BLUE, GREY = (200, 30, 40), (20, 180, 60), (30, 50, 210), (128, 128, 128)
HEADER_SAYS_HUGE = 10**6  # pixels on a side: 10^12 in all


@dataclass(frozen=True)
class Dirty:
    """A file.

    Attributes:
        content: its bytes.
        expected: of a picture the size (width, height) and the colours of its four quarters, of a recording
            the mean level at 24 kHz; None for a file that must be skipped.
        reason: what the message must say of a skipped file.
    """

    content: bytes
    expected: tuple | float | None = None
    reason: str = ""


def quarters(side: int = SIDE) -> Image.Image:
    """Red and green above blue and grey: colours and orientation can be told from it."""
    pixels = np.empty((side, side, 3), np.uint8)
    half = side // 2
    pixels[:half, :half], pixels[:half, half:] = RED, GREEN
    pixels[half:, :half], pixels[half:, half:] = BLUE, GREY
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file as its specification has it, also one that Pillow would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sixteen_bit_rgb_png() -> bytes:
    pixels = np.asarray(quarters()).astype(np.uint16) * 257
    return png(SIDE, SIDE, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))


def dirty_pictures() -> dict[str, Dirty]:
    """Name to file. Sound ones show `quarters`, or say in `expected` what they show."""
    picture, size = quarters(), (SIDE, SIDE)
    whole = (size, (RED, GREEN, BLUE, GREY))
    grey = picture.convert("L")
    greys = (size, tuple((level,) * 3 for level in (grey.getpixel((x, y)) for x, y in CENTRES)))
    jpeg = saved(picture, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    sideways = picture.transpose(Image.Transpose.ROTATE_90)
    palette = picture.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128] + [255] * 14)
    wide = np.asarray(grey).astype(np.uint16) * 257
    blank = Image.new("RGB", size)
    moving = {"save_all": True, "append_images": [blank, blank]}
    return {
        # Sound, if odd.
        "cmyk.jpg": Dirty(saved(picture.convert("CMYK"), "JPEG", quality=95), whole),
        "cmyk.tif": Dirty(saved(picture.convert("CMYK"), "TIFF"), whole),
        "grey16.png": Dirty(saved(Image.fromarray(wide), "PNG"), greys),
        "grey16.tif": Dirty(saved(Image.fromarray(wide), "TIFF"), greys),
        "grey16.pgm": Dirty(b"P5 48 48 65535\n" + wide.astype(">u2").tobytes(), greys),
        "rgb16.png": Dirty(sixteen_bit_rgb_png(), whole),
        "palette.png": Dirty(saved(palette, "PNG"), whole),
        "transparent.png": Dirty(saved(transparent, "PNG"), whole),
        "alpha.png": Dirty(saved(picture.convert("RGBA"), "PNG"), whole),
        "grey-alpha.png": Dirty(saved(grey.convert("LA"), "PNG"), greys),
        "animated.gif": Dirty(saved(picture, "GIF", **moving), whole),
        "animated.png": Dirty(saved(picture, "PNG", **moving), whole),
        "turned.jpg": Dirty(saved(sideways, "JPEG", quality=95, exif=exif), whole),
        "really-a-png.jpg": Dirty(saved(picture, "PNG"), whole),
        "really-a-jpeg.png": Dirty(jpeg, whole),
        "flat-strip.png": Dirty(saved(Image.new("RGB", (200, 1), RED), "PNG"), ((200, 1), (RED,) * 4)),
        "high-strip.png": Dirty(saved(Image.new("RGB", (1, 200), BLUE), "PNG"), ((1, 200), (BLUE,) * 4)),
        "one-pixel.png": Dirty(saved(Image.new("RGB", (1, 1), GREEN), "PNG"), ((1, 1), (GREEN,) * 4)),
        # Beyond use.
        "cut-half.jpg": Dirty(jpeg[: len(jpeg) // 2], reason="[Tt]runcated"),
        "cut-header.jpg": Dirty(jpeg[:20], reason="."),
        "cut.png": Dirty(saved(picture.resize((400, 400)), "PNG")[:700], reason="."),
        "empty.jpg": Dirty(b"", reason="empty"),
        "zeros.jpg": Dirty(bytes(5000), reason="not an image"),
        "text.jpg": Dirty(b"This is not the image that you were looking for.\n" * 9, reason="not an image"),
        "page.jpg": Dirty(b"<!DOCTYPE html><title>404 Not Found</title>", reason="not an image"),
        "bomb.png": Dirty(png(30_000, 30_000, 8, 0, bytes(30_001) * 100), reason="bomb"),
        "huge-header.png": Dirty(png(HEADER_SAYS_HUGE, HEADER_SAYS_HUGE, 8, 2, b""), reason="bomb"),
        "very-long-strip.png": Dirty(saved(Image.new("L", (60_000, 1)), "PNG"), reason="elongated"),
        "float.tif": Dirty(saved(Image.fromarray(np.eye(48, dtype=np.float32)), "TIFF"), reason="range"),
        "script.jpg": Dirty(POSTSCRIPT, reason="not an image"),
    }  # fmt: skip


# Where the quarters' colours are read, as parts of a side of SIDE.
CENTRES = [(SIDE // 4, SIDE // 4), (SIDE * 3 // 4, SIDE // 4)]
CENTRES += [(SIDE // 4, SIDE * 3 // 4), (SIDE * 3 // 4, SIDE * 3 // 4)]
# Pillow takes this for an image and hands it to Ghostscript, where there is one: it is a program.
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\n%%EndComments\n"
    b"1 0 0 setrgbcolor 0 0 48 48 rectfill\nshowpage\n%%EOF\n"
)


def colours(image: Image.Image) -> list[tuple[int, int, int]]:
    """The colours in the middle of the four quarters."""
    width, height = image.size
    places = [(1, 1), (3, 1), (1, 3), (3, 3)]
    return [image.getpixel((x * width // 4, y * height // 4)) for x, y in places]


def recording(samples: np.ndarray, rate: int = 24_000, kind: str = "WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def wav(data: bytes, *, declared: int, rate: int = 24_000, channels: int = 1) -> bytes:
    """A 16-bit WAV file whose header declares so many bytes of samples."""
    frame = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame, frame, 16)
    head = (
        b"RIFF"
        + struct.pack("<I", min(declared + 36, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
    )
    return head + form + b"data" + struct.pack("<I", declared) + data


def flac_of_unknown_length(samples: np.ndarray) -> bytes:
    """As an encoder writes to a pipe: the header's number of samples, 36 bits, is 0."""
    return _flac_declaring(samples, 0)


def _flac_declaring(samples: np.ndarray, count: int) -> bytes:
    content = bytearray(recording(samples, kind="FLAC"))
    # "fLaC", 4 bytes of block header, then STREAMINFO: the count is the last 36 bits of its bytes 10 to 17.
    content[21] = content[21] & 0xF0 | count >> 32
    content[22:26] = struct.pack(">I", count & 0xFFFFFFFF)
    content[26:42] = bytes(16)  # no checksum
    return bytes(content)


def dirty_recordings() -> dict[str, Dirty]:
    """Name to file. Sound ones have a constant level, which `expected` names."""
    level = np.full(24_000, 0.25, np.float32)
    six = np.stack([level * factor for factor in (0, 1, 2, 0, 1, 2)], axis=1)
    spoilt, infinite = level.copy(), level.copy()
    spoilt[12_000], infinite[12_000] = np.nan, np.inf
    flac = recording(np.random.default_rng(0).uniform(-1, 1, 24_000) * 0.1, kind="FLAC")
    sixteen_bits = (level * 32_768).astype("<i2").tobytes()
    return {
        # Sound, if odd.
        "8bit.wav": Dirty(recording(level, subtype="PCM_U8"), 0.25),
        "24bit.wav": Dirty(recording(level, subtype="PCM_24"), 0.25),
        "float32.wav": Dirty(recording(level, subtype="FLOAT"), 0.25),
        "float64.wav": Dirty(recording(level, subtype="DOUBLE"), 0.25),
        "six-channels.wav": Dirty(recording(six, subtype="FLOAT"), 0.25),
        "96khz.wav": Dirty(recording(np.tile(level, 4), rate=96_000), 0.25),
        "silence.wav": Dirty(recording(level * 0), 0.0),
        "one-sample.wav": Dirty(recording(level[:1]), 0.25),
        "really-a-flac.wav": Dirty(recording(level, kind="FLAC"), 0.25),
        "from-a-pipe.wav": Dirty(wav(sixteen_bits, declared=2**32 - 1), 0.25),
        "from-a-pipe.flac": Dirty(flac_of_unknown_length(level), 0.25),
        # Beyond use.
        "cut.flac": Dirty(flac[: len(flac) // 2], reason="ends before|lost sync"),
        "cut-header.wav": Dirty(recording(level)[:20], reason="."),
        "empty.wav": Dirty(b"", reason="empty"),
        "no-samples.wav": Dirty(recording(level[:0]), reason="no samples"),
        "text.wav": Dirty(b"This is not the sound that you were looking for.\n" * 9, reason="[Ff]ormat"),
        "nan.wav": Dirty(recording(spoilt, subtype="FLOAT"), reason="NaN"),
        "infinite.wav": Dirty(recording(infinite, subtype="FLOAT"), reason="infinite"),
        "not-scaled.wav": Dirty(recording(level * 32_768, subtype="FLOAT"), reason="8192"),
        "huge-header.flac": Dirty(_flac_declaring(level, 2**36 - 1), reason="."),
        "one-hertz.wav": Dirty(recording(np.tile(level, 10), rate=1), reason="1 Hz"),
    }  # fmt: skip
