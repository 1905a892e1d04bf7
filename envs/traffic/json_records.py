"""Records of a JSON log: an object per line, or one array of objects; and the values in them, by path.

This module must not know what the values mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from policies.json_text import read_json

_MARKS = re.compile(r'["\\{}\[\]]')
_STRING_ENDS = re.compile(r'["\\]')


def json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Line number and object of each line; a malformed one comes as the `ValueError` that says so."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _object(line)


def json_array(lines: Iterable[str], longest: int) -> Iterator[tuple[int, Any]]:
    """The objects of one array, each with the line that it begins on, however they are spread over lines.

    Args:
        lines: the text, which begins with the array's bracket.
        longest: most characters of an object.
    """
    depth, in_string, began = 0, False, 0
    parts: list[str] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        place = 0  # what lies before it has been taken in
        at = 0
        while match := (_STRING_ENDS if in_string else _MARKS).search(line, at):
            mark, at = match.group(), match.end()
            if mark == "\\":
                at += 1
            elif mark == '"':
                in_string = not in_string
            elif mark in "{[":
                depth += 1
                if depth == 2:
                    began, place = number, match.start()
            else:
                depth -= 1
                if depth == 1:
                    yield began, _object("".join([*parts, line[place:at]]))
                    parts, size = [], 0
        if depth > 1:
            parts.append(line[place:])
            size += len(line) - place
            if size > longest:
                yield began, ValueError(f"longer than {longest} characters, expected a request")
                return
    if depth > 0:
        yield began, ValueError("the file ends within the array")


def paths_of(record: Mapping[str, Any]) -> set[str]:
    """The names in a record, those in objects within it by path.

    >>> sorted(paths_of({"id": 1, "usage": {"input": 5, "output": 6}}))
    ['id', 'usage', 'usage.input', 'usage.output']
    """
    found = set(record)
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}" for inner in paths_of(value)}
    return found


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a name, or of a path through objects within.

    Raises:
        KeyError: when it is not there.
    """
    if path in record or "." not in path:
        return record[path]
    first, _, rest = path.partition(".")
    inner = record[first]
    if not isinstance(inner, dict):
        raise KeyError(path)
    return value_at(inner, rest)


def _object(text: str) -> Any:
    try:
        record = read_json(text, any_number=True)
    except ValueError as error:
        return ValueError(f"expected a JSON object: {str(error)[:100]}")
    return record if isinstance(record, dict) else ValueError("expected a JSON object")
