"""How large an answer of a server may be, once it is unpacked.

This module must not know who answers, nor over what.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_ANSWER_BYTES = 64 * 2**20
"""Several times what 10,000 pods, tens of thousands of HAProxy's servers or the queries of 1,000 services fill."""


class AnswerTooLargeError(OSError):
    """Raised for an answer that is larger than any that is asked for; a few kilobytes may unpack to gigabytes."""


def whole(parts: Iterable[bytes]) -> bytes:
    """An answer of its unpacked parts. Raises `AnswerTooLargeError`."""
    answer = bytearray()
    for part in parts:
        answer += part
        if len(answer) > MAX_ANSWER_BYTES:
            raise AnswerTooLargeError(f"the answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
    return bytes(answer)
