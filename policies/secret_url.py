"""URLs that show their passwords to nobody who does not ask for them.

This module must not know what is behind them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, GetCoreSchemaHandler
from pydantic_core import core_schema

from policies.redaction import HIDDEN, SECRET_FIELD, redacted_url, remember

REVEALED = {"secrets": "revealed"}
"""Context for `model_dump_json` where a configuration goes to another process of our own."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Url:
    """A URL that shows its password to nobody who does not ask for it.

    >>> str(Url("postgresql://me:s3cret@db/jevons"))
    'postgresql://me:***@db/jevons'
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        text = redacted_url(self._text)
        return text if "://" in text else re.sub(r"^([^:@]*):.*@", rf"\1:{HIDDEN}@", text)

    def __repr__(self) -> str:
        return repr(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def template(self) -> str:
        """The text as configured, its ${NAME}s unread: never to be shown."""
        return self._text

    def reveal(self, environment: Mapping[str, str] | None = None) -> str:
        """The text to connect with, ${NAME} replaced by the environment's values.

        >>> Url("postgresql://me:${PASSWORD}@db/jevons").reveal({"PASSWORD": "secret"})
        'postgresql://me:secret@db/jevons'

        Raises:
            ValueError: when a name is not set.
        """
        values = os.environ if environment is None else environment

        def value(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise ValueError(f"{self} names the environment variable {match[1]}, which is not set")
            # A host, a user or a database may come from the environment too: their names are ordinary words.
            parameter = re.split(r"[?&/@]", self._text[: match.start()])[-1]
            if SECRET_FIELD.search(parameter + match[1]):
                remember(values[match[1]])
            return values[match[1]]

        text = _VARIABLE.sub(value, self._text)
        _, found, rest = text.partition("://")
        login, at, _ = rest.rpartition("@")
        user, _, password = login.partition(":")
        if found and at and password != user:  # a user's own name as the password would hide that name everywhere
            remember(password)
        return text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._parsed,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda url, info: url.template if info.context == REVEALED else str(url), info_arg=True
            ),
        )

    @classmethod
    def _parsed(cls, value: object) -> Url:
        if isinstance(value, Url):
            return value
        if not isinstance(value, str) or not value or not value.isprintable():
            raise ValueError("expected a URL, one line of text")
        return cls(value)


def _http(url: Url) -> Url:
    if not re.match(r"https?://[^\s/]", url.template):
        raise ValueError("expected a URL that begins with http:// or https://")
    return url


HttpUrl = Annotated[Url, AfterValidator(_http)]
"""Of a server that is asked over HTTP."""
