"""Files that appear whole or not at all, however the process that writes them ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".*.partial"
"""What a killed writer may leave beside its file, as a pattern."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a temporary name, then rename it.

    Raises:
        OSError: when it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what kept it from being written may keep it from being deleted
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8.

    Raises:
        OSError: when it cannot be written.
    """
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
