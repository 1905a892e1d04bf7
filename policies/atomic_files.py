"""Files that appear whole or not at all, however the process that writes them ends."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".*.partial"
"""What a killed writer may leave beside its file, as a pattern."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a temporary name, then rename it.

    The name cannot be guessed and the file is new: nobody who may write to the folder can have put a link there.

    Raises:
        OSError: when it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise _refusal(path, error) from None
    try:
        write(partial)
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what kept it from being written may keep it from being deleted
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refusal(path, error) from None
        raise


def _refusal(path: Path, error: OSError) -> OSError:
    return OSError(f"{path}: cannot be written: {error.strerror or error}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8.

    Raises:
        OSError: when it cannot be written.
    """
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
