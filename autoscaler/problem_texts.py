"""Problems in words that stay the same for as long as the problem does.

This module must not know what goes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from policies.redaction import QUOTED, in_short, redacted

MOST_READ = 100_000
"""Letters of an error that are looked at: it may quote a server's whole answer, or the address with a long query."""
SOME = 3
"""Names that one problem tells."""
_UNSTEADY = re.compile(r"\((?:read |connect )?timeout=[\d.]+\)|<[\w.]+ object at 0x[0-9a-f]+>(?:: )?")
"""What client libraries put into their errors that is another one at each try: the time that was left, an address."""
LONGEST_NAME = 80
_NAME = re.compile(rf"[^\s,;']{{1,{LONGEST_NAME}}}")
_WHERE = re.compile(r"HTTPS?Connection(?:Pool)?\(host=[^)]*\): ")
_MEASURED = re.compile(r"\d+\.\d+|\d+(?= ?(?:ms|s|min|h)\b)")


def steady(error: object) -> str:
    """An error in one line that is the same at each try.

    >>> steady("HTTPConnectionPool(host='a', port=9): Read timed out. (read timeout=0.507)")
    "HTTPConnectionPool(host='a', port=9): Read timed out."
    """
    return " ".join(_UNSTEADY.sub("", str(error)[:MOST_READ]).split())


def quoted(error: object, longest: int = QUOTED) -> str:
    """An error that may quote what others wrote, in one steady line of bounded length, without secrets.

    They are hidden first: one with a line break in it would not be found afterwards.
    """
    return in_short(steady(redacted(str(error)[:MOST_READ])), longest)


def bare(error: object) -> str:
    """The same without where it was that a connection failed, for who names that in his own words.

    >>> bare("HTTPSConnection(host='a', port=9): Failed to establish a new connection: [Errno 111] Connection refused")
    'Failed to establish a new connection: [Errno 111] Connection refused'
    """
    return _WHERE.sub("", steady(error))


def some_of(names: Sequence[str], most: int = SOME) -> str:
    """The first few names, and how many more there are; one that others could have written a sentence into is quoted.

    >>> some_of(["arrival", "queue", "running"]), some_of(["a", "b", "c", "d", "e"])
    ('arrival, queue, running', 'a, b, c and 2 more')
    >>> some_of(["10.0.0.9:8000", "pods; all is well"])
    "10.0.0.9:8000, 'pods; all is well'"
    """
    first = ", ".join(name if _NAME.fullmatch(name) else repr(name[:LONGEST_NAME]) for name in names[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first


def kind(problem: str) -> str:
    """What tells one problem from another: its words without times and measured values; counts are news.

    >>> kind("chat: the newest sample is 90 s old, 3 of 4 replicas are scraped")
    'chat: the newest sample is # s old, 3 of 4 replicas are scraped'
    """
    return _MEASURED.sub("#", steady(problem))
