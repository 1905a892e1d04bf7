"""YAML within bounds: what a configuration can mean in one way only, and nothing that grows when it is read.

This module must not know what the YAML configures.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 40
MAX_NODES = 100_000
"""Values with every alias written out; a few lines of aliases can stand for billions."""
MAX_DIGITS = 40
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class YamlRefused(ValueError):  # noqa: N818 - reads as the state that it reports
    """Raised when a text is no YAML, or is not within bounds; the message names the line."""


def parse_yaml(text: str) -> object:
    """The value of one YAML document.

    Raises:
        YamlRefused: when it is not valid, names a key twice, is too large, deep or long, or its aliases multiply.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise YamlRefused(f"larger than {MAX_BYTES} bytes, expected a configuration")
    try:
        return _Loader(text).get_single_data()
    except YamlRefused:
        raise
    except yaml.MarkedYAMLError as error:  # its own sentence quotes the lines around, secrets among them
        mark, problem = error.problem_mark, " ".join(str(error.problem).split())[:200]
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlRefused(f"{where}not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise YamlRefused(f"not valid YAML: {' '.join(str(error).split())[:200]}") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of finished nodes by identity, their aliases written out
        self._depths: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            if id(node) not in self._sizes:
                if isinstance(event, yaml.AliasEvent):
                    raise _refused(event.start_mark, "an alias of what it is part of")
                children = [id(child) for child in _children(node)]
                self._sizes[id(node)] = 1 + sum(self._sizes[child] for child in children)
                self._depths[id(node)] = 1 + max((self._depths[child] for child in children), default=0)
                # Here: what is merged (`<<`) stands beside the node's own keys once the values are made.
                _refuse_doubled_keys(node)
            if self._sizes[id(node)] > MAX_NODES:
                raise _refused(event.start_mark, f"more than {MAX_NODES} values, with every alias written out")
            if self._depth + self._depths[id(node)] > MAX_DEPTH:
                raise _refused(event.start_mark, f"nested deeper than {MAX_DEPTH} levels, with every alias written out")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _refused(node.start_mark, f"a number of more than {MAX_DIGITS} digits")
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            if isinstance(error, YamlRefused):
                raise
            # A date that is none, for example; the library lets Python's own errors through.
            raise _refused(node.start_mark, f"{str(node.value)[:MAX_DIGITS]!r} is no value: {error}") from None


def _refuse_doubled_keys(node: yaml.Node) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        name = (key.tag, str(key.value))
        if isinstance(key, yaml.ScalarNode) and name in first:
            line = first[name].start_mark.line + 1
            raise _refused(key.start_mark, f"the key {key.value[:MAX_DIGITS]!r} is there already, in line {line}")
        first.setdefault(name, key)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refused(mark: Any, why: str) -> YamlRefused:
    return YamlRefused(f"line {mark.line + 1}: {why}")
