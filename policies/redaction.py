"""Secrets kept out of whatever is shown, logged or stored, and control over a terminal kept from other people's texts.

`redacted` hides the secrets that were read, and what stands where secrets stand: errors of servers and drivers quote
addresses and headers. Every place where text leaves Jevons goes through it: streams, logs, rows of the database.
This module must not know what the secrets open.
"""

from __future__ import annotations

import base64
import html
import json
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST = 6
"""Letters of a secret that is hidden wherever it stands; a shorter one would hide ordinary words."""
LONGEST = 500
"""Letters of a sentence that quotes what others wrote: labels, names and errors may be of any length."""
QUOTED = 300
"""Letters of what a server said that a sentence about it repeats."""
SECRET_FIELD = re.compile(
    r"pass|pwd|secret|(?<!prefill_)token(?!s|\d)|key|credential|auth|cookie|header", re.IGNORECASE
)
"""Words in the name of a field whose value is not repeated; tokens of prompts and outputs are no secrets."""
KEPT = 8
"""Secrets of one place that stay hidden, the newest: what has just been replaced may still be quoted."""
_known: Mapping[str, tuple[str, ...]] = {}
"""Secrets by the place that they were read from, the newest last. Threads read it: it is replaced and never changed."""
_forms: tuple[str, ...] = ()
"""All of them as they may be written, the longest first."""
_remembering = threading.Lock()
_ESCAPE = re.compile("%[0-9A-F]{2}")
_URL_SAFE = str.maketrans("+/", "-_")

_WORDS = r"(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|credentials?"
_WORDS += r"|(?:access|auth|bearer|id|refresh|session)[_-]?token)"
# Megabytes that others write go through these: no two parts of unbounded length may meet the same letters.
_USER = re.compile(r"""(://[^\s/?#'"\\<>:@]{0,256}):(?!\$\{\w+\}@)[^\s'"\\<>]{0,512}@""")
_BARE_USER = re.compile(r"""(\bhttps?://)(?!\*\*\*@)[^\s/?#'"\\<>:@]+@""", re.IGNORECASE)
_QUERY = re.compile(
    rf"""([?&][\w.-]{{0,64}}(?:{_WORDS}|token|signature|sig|auth)[\w.-]{{0,64}}=)[^\s&#'"\\<>]+""", re.IGNORECASE
)
_PAIR = re.compile(rf"""({_WORDS}(?:['"]\s*:\s*['"]?|:|\s*=\s*['"]?))(?!\*\*\*)[^\s'"\\,;&<>]+""", re.IGNORECASE)
_HEADER = re.compile(
    r"""(\b(?:proxy-)?authorization['"]?\s*[:=]\s*['"]?(?:[a-z]+\s+)?"""
    r"""|\bx-[\w-]{0,64}(?:token|auth|key)[\w-]{0,64}['"]?\s*[:=]\s*['"]?)[^\s'"\\,<>]+""",
    re.IGNORECASE,
)
_COOKIES = re.compile(r"""(\bcookie['"]?\s*[:=]\s*['"]?)[^\r\n'"\\<>]+""", re.IGNORECASE)
_WHOLE_USER = re.compile(r"\A([a-z][a-z0-9+.-]*://[^/?#:@]*):(?!\$\{\w+\}@).*@", re.IGNORECASE | re.DOTALL)
_WHOLE_BARE_USER = re.compile(r"\A(https?://)[^/?#:@]+@", re.IGNORECASE)
_SCHEME = re.compile(r"""\b(Bearer|Basic)(\s+)(?=[^\s'"]*(?:\d|=|[._-]\w))[\w.~+/=-]{8,}""")


def remember(secret: str, place: str = "") -> None:
    """Hide this text wherever it would be shown from now on, also as `_spellings` has it.

    Args:
        secret: the text.
        place: where it was read, such as a file, if it is replaced there while we run: of each place the newest `KEPT`
            stay hidden. Without a place it stays so for as long as the process lives.
    """
    global _known, _forms
    if len(secret) < SHORTEST or secret == _known.get(place, ("",))[-1]:
        return
    with _remembering:
        others = tuple(one for one in _known.get(place, ()) if one != secret)
        _known = {**_known, place: (*(others[1 - KEPT :] if place else others), secret)}
        forms = {form for secrets in _known.values() for one in secrets for form in _spellings(one)}
        _forms = tuple(sorted(forms, key=len, reverse=True))


def _spellings(secret: str) -> set[str]:
    """A text as it is written in URLs, JSON, Python, HTML and in base64 of whatever it is a part of."""
    in_urls = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    in_urls |= {_ESCAPE.sub(lambda escape: escape[0].lower(), spelling) for spelling in in_urls}
    in_urls |= {spelling.lower() for spelling in in_urls}
    in_html = {html.escape(secret), html.escape(secret, quote=False)}
    in_html |= {html.escape(secret).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")}  # Go, Jinja
    in_html |= {spelling.replace("+", "&#43;") for spelling in in_html}
    in_base64 = {part for place in range(3) for part in _within_base64(secret.encode(errors="replace"), place)}
    written = {secret.lower(), secret.upper(), unquote(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    written |= {repr(secret.encode(errors="replace"))[2:-1]}  # an answer's body, as a client quotes it
    return {secret, *written, *in_urls, *in_html, *in_base64}


def _within_base64(secret: bytes, place: int) -> set[str]:
    """The letters of base64 that hold nothing else, where the secret begins at a byte of the group of three."""
    letters = base64.b64encode(bytes(place) + secret).decode()
    first, last = -(-8 * place // 6), 8 * (place + len(secret)) // 6
    return {letters[first:last], letters[first:last].translate(_URL_SAFE)}


def redacted(text: str) -> str:
    """A text without secrets: those that are known, and what stands where secrets stand in URLs, headers and pairs.

    >>> redacted("GET http://me:s3cret@host:9090/?token=abc Authorization: Bearer eyJh.x")
    'GET http://me:***@host:9090/?token=*** Authorization: Bearer ***'
    """
    for secret in _forms:
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(rf"\1:{HIDDEN}@", text)
    text = _BARE_USER.sub(rf"\1{HIDDEN}@", text)
    text = _SCHEME.sub(rf"\1\2{HIDDEN}", text)
    for pattern in (_QUERY, _PAIR, _HEADER, _COOKIES):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def redacted_url(url: str) -> str:
    """A text that is one URL and nothing else: its password may hold quotes and blanks, where one in a sentence ends.

    >>> redacted_url("postgresql://me:it's a secret@db/jevons")
    'postgresql://me:***@db/jevons'
    """
    hidden = _WHOLE_BARE_USER.sub(rf"\1{HIDDEN}@", _WHOLE_USER.sub(rf"\1:{HIDDEN}@", url))
    return redacted(hidden)


def scrubbed(data: Any) -> Any:
    """Plain data with every text in it redacted."""
    if isinstance(data, str):
        return redacted(data)
    if isinstance(data, Mapping):
        return {key: scrubbed(value) for key, value in data.items()}
    return [scrubbed(value) for value in data] if isinstance(data, list | tuple) else data


def shown(text: object) -> str:
    r"""One line for a terminal or a log: no secrets, and characters that would control it spelled out.

    >>> shown("pod\x1b[2J\nnext")
    'pod\\x1b[2J\\nnext'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in redacted(str(text))
    )


def in_short(text: str, longest: int = LONGEST) -> str:
    """A sentence that quotes others, no longer than people read.

    Redacted before it is cut, as half a secret would not be found; and not all of what may be a megabyte, for long.
    """
    text = redacted(text[: 4 * longest])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


class _Guarded:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Redact whatever this process prints from now on, tracebacks included."""
    sys.stdout = _Guarded(sys.stdout)
    sys.stderr = _Guarded(sys.stderr)
