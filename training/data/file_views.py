"""A stretch of a file as a file of its own, with some bytes replaced and a length of one's choice."""

import io
from typing import BinaryIO


class FileView(io.RawIOBase):
    """Bytes [begin, end) of a file that can be read and moved in; nothing is copied.

    Args:
        file: not closed with the view. Several views may share it, if one is read at a time.
        replaced: place in the view to the bytes that are read there instead.
        claimed: length that the view pretends to have; what the file does not hold is zeros.
    """

    def __init__(
        self,
        file: BinaryIO,
        begin: int,
        end: int,
        replaced: dict[int, bytes] | None = None,
        claimed: int | None = None,
    ):
        self.file, self.begin, self.size = file, begin, end - begin
        self.replaced, self.claimed = replaced or {}, claimed or end - begin
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.claimed}[
            whence
        ] + offset
        return self.place

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self.claimed - self.place))
        there = max(0, min(wanted, self.size - self.place))
        content = bytearray(wanted)
        if there:
            self.file.seek(self.begin + self.place)
            content[:there] = self.file.read(there).ljust(there, b"\0")
        for offset, value in self.replaced.items():
            first, last = max(offset, self.place), min(offset + len(value), self.place + wanted)
            if first < last:
                content[first - self.place : last - self.place] = value[
                    first - offset : last - offset
                ]
        memoryview(buffer).cast("B")[:wanted] = content
        self.place += wanted
        return wanted


def file_size(file: BinaryIO) -> int:
    """Bytes of a file; it is left at its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size
