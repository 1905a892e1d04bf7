"""What a controller says at its metrics port that is silent in the database: it may live, and not be able to write.

This module must not know what a status holds.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from autoscaler.hosting.presence import OWN_PAGE, PROCESS
from autoscaler.problem_texts import bare
from autoscaler.stages import Overdue, within
from policies.json_text import read_json

ASK_S = 1.0
"""Longest wait for all of them, seconds."""
MAX_BYTES = 1 << 20
"""Of one answer."""
ANYWHERE = {"", "0.0.0.0", "::"}
"""What a controller listens on that is on no one address."""
CAUSES = "its process is gone or stands still, or its disk is full, or the database is not writable: its log says which"


class Silent(NamedTuple):
    """A controller that should say something, and does not.

    Attributes:
        process: its identifier.
        host: on which it runs.
        port: of its metrics; None where it serves none.
    """

    process: str
    host: str
    port: int | None


class Answer(NamedTuple):
    """What became of a question.

    Attributes:
        told: in words, for people.
        said: what it says of itself now; empty where there is no answer.
    """

    told: str
    said: Mapping[str, Any]


def ask(silent: Sequence[Silent], address: str) -> list[Answer]:
    """Ask each of them at the same time.

    Args:
        silent: whom.
        address: on which their metrics are served, as configured.
    """
    if not silent:
        return []
    with ThreadPoolExecutor(len(silent)) as threads:
        return list(threads.map(lambda one: _ask(one, address), silent))


def _ask(one: Silent, address: str) -> Answer:
    here = one.host == socket.gethostname()
    local = address in {"127.0.0.1", "::1", "localhost"}
    if not one.port or (local and not here):
        return Answer(CAUSES, {})
    host = ("127.0.0.1" if here else one.host) if address in ANYWHERE else address
    url = f"http://{f'[{host}]' if ':' in host else host}:{one.port}"
    try:
        said = within(ASK_S, "ask", lambda: _said(f"{url}{OWN_PAGE}"))
    except Exception as error:  # whoever is there, and whatever is answered
        reason = getattr(error, "reason", error)
        why = "no answer in time" if isinstance(reason, Overdue | TimeoutError) else bare(reason)
        return Answer(f"{url} does not answer ({why}): {CAUSES}", {})
    if said.get(PROCESS) != one.process:
        return Answer(f"another process answers at {url}: {CAUSES}", {})
    return Answer(f"{url} answers: it lives, and what it says does not reach this database", said)


def _said(url: str) -> Mapping[str, Any]:
    from urllib.request import ProxyHandler, build_opener

    with build_opener(ProxyHandler({})).open(url, timeout=ASK_S) as response:
        answer = read_json(response.read(MAX_BYTES))
    if not isinstance(answer, dict):
        raise ValueError("an answer of another shape")
    return answer
