"""What a process that hosts controllers sets for itself, once: its log, how it holds memory, what it says when it dies.

This module must not know what the process hosts.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
from contextlib import suppress

from autoscaler.hosting.decision_log import LogFormat, configure_logging

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def prepare(log: LogFormat) -> None:
    """Before the first thread starts: log to standard error, hold one heap, and leave stacks there when it crashes."""
    configure_logging(log)
    # What ends the process from below (a damaged file that is mapped, native code that fails) is in the log, too.
    faulthandler.enable()
    _hold_one_heap()


def _hold_one_heap() -> None:
    """Let all threads share glibc's first heap; where there is no glibc, or an operator has chosen, nothing changes.

    Left alone, it makes up to eight heaps a core for a process with many threads, and each keeps the fragments of its
    own: a controller held 8 MB more at once and grew by 3 to 5 MB an hour with nothing more in use. Its threads wait
    for servers and share the interpreter's lock, so one heap costs them nothing.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
