"""Names that are safe wherever they travel: objects of Kubernetes, commands to HAProxy, PromQL, paths, terminals.

One alphabet for all of them: what is refused here needs no quoting anywhere else.
This module must not know what is named.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

LONGEST = 120
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(_WORD)
_OBJECT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")
_KEY = re.compile(rf"(?:{_WORD}/)?{_WORD}")
_LABEL = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_TITLE = re.compile(r"[A-Za-z0-9._/:+,()@-](?:[A-Za-z0-9 ._/:+,()@-]*[A-Za-z0-9._/:+,()@-])?")


def _checked(text: str, pattern: re.Pattern[str], expected: str) -> str:
    if len(text) > LONGEST or not pattern.fullmatch(text):
        raise ValueError(f"expected {expected}, at most {LONGEST} characters")
    return text


def _line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("expected one line of text without control characters")
    return text


def checked_name(text: str) -> str:
    """The text, if it is a name.

    Raises:
        ValueError: when it is not.
    """
    return _checked(text, _NAME, "letters, digits, '-', '_' and '.', with a letter or digit at both ends")


def _name_or_none(text: str) -> str:
    return text and checked_name(text)


def _key(text: str) -> str:
    return _checked(text, _KEY, "a name of letters, digits, '-', '_' and '.', which may follow a prefix and '/'")


def _label(text: str) -> str:
    return _checked(text, _LABEL, "a label of Prometheus: letters, digits, '_', '-' and '.', beginning with a letter")


def _title(text: str) -> str:
    return _checked(text, _TITLE, "letters, digits, any of ._/:+,()@- and blanks between them")


def _object(text: str) -> str:
    return _checked(text, _OBJECT, "letters, digits and any of -_.: with a letter or digit at both ends")


def _template(text: str) -> str:
    # `str.format` would look up attributes and indices of any other field.
    plain = text.replace("{service}", "x").replace("{pool}", "x")
    _checked(
        plain, _OBJECT, "letters, digits, '-', '_', '.', ':', {service} and {pool}, with a letter or digit at both ends"
    )
    return text


Line = Annotated[str, AfterValidator(_line)]
"""What is shown and sent nowhere, such as the scenario that a simulated service is."""
Name = Annotated[str, AfterValidator(checked_name)]
"""Of a service, a pool, a controller, a namespace, an object."""
OptionalName = Annotated[str, AfterValidator(_name_or_none)]
"""A name, or empty."""
ObjectName = Annotated[str, AfterValidator(_object)]
"""What HAProxy calls a backend and Ray Serve a deployment: ``LLMServer:qwen3-8b``."""
NameTemplate = Annotated[str, AfterValidator(_template)]
"""An object's name in which ``{service}`` and ``{pool}`` are filled in."""
Key = Annotated[str, AfterValidator(_key)]
"""A name that may have a prefix, as keys and annotations of Kubernetes and models have: ``jevons.dev/batch-cap``."""
LabelName = Annotated[str, AfterValidator(_label)]
"""Of a label in Prometheus."""
Title = Annotated[str, AfterValidator(_title)]
"""What people call a model, a GPU or an engine: ``Qwen/Qwen3-32B``, ``vllm 0.24.0``."""
