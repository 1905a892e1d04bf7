"""Files from outside, read within bounds: whatever a path turns out to name, reading it ends.

This module must not know what is in the files.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

PART_BYTES = 2**20


class TooLarge(OSError):  # noqa: N818 - reads as the state that it reports
    """Raised when a file holds more than it may."""


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, at most `limit` of them; a device has no end, and a FIFO may never have a beginning.

    Raises:
        TooLarge: when it holds more.
        OSError: when it is no regular file, or cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("is no regular file")
        content = bytearray()
        while part := file.read(PART_BYTES):
            content += part
            if len(content) > limit:
                raise TooLarge(f"larger than {limit} bytes")
    return bytes(content)
