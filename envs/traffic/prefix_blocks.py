"""What the hashed prompt blocks of a log say: prefix hits of an unbounded cache, and conversations.

This module must not know about files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A block used more often than this is a shared system prompt rather than the history of one conversation.
_SESSION_BLOCK_USES = 40


def prefix_hits(blocks: list[list[Any]], block_tokens: int) -> NDArray[np.int64]:
    """Tokens in leading blocks seen in an earlier request, shape ``(requests,)``: an unbounded shared cache."""
    seen: set[Any] = set()
    hits = np.zeros(len(blocks), np.int64)
    for row, ids in enumerate(blocks):
        hits[row] = block_tokens * sum(1 for _ in itertools.takewhile(seen.__contains__, ids))
        seen.update(ids)
    return hits


def block_sessions(blocks: list[list[Any]]) -> NDArray[np.int32]:
    """Session ids derived from shared prompt blocks, shape ``(requests,)``.

    A request joins the session that owns its deepest block used at most 40 times in the log, else it opens one.
    """
    uses = Counter(block for ids in blocks for block in ids)
    owner: dict[Any, int] = {}
    sessions = np.zeros(len(blocks), np.int32)
    opened = 0
    for row, ids in enumerate(blocks):
        deepest = next((i for i in reversed(ids) if i in owner and uses[i] <= _SESSION_BLOCK_USES), None)
        if deepest is None:
            session, opened = opened, opened + 1
        else:
            session = owner[deepest]
        sessions[row] = session
        for block in ids:
            owner.setdefault(block, session)
    return sessions
