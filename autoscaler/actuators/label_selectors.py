"""Label selectors: which pods an object counts as its own, and how few watches see them all.

This module must not know about pods or servers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

MAX_VALUES = 100
"""Values of one label that a watch names; with more of them it takes every object that has the label."""
# From a selector as the API server writes it: `a=b`, `a!=b`, `a in (b,c)`, `a notin (b)`, `a`, `!a`.
_REQUIREMENT = re.compile(
    r"\s*(?:!\s*(?P<absent>[^\s,=!()]+)"
    r"|(?P<key>[^\s,=!()]+)\s*(?:(?P<equals>==?|!=)\s*(?P<value>[^\s,=!()]*)"
    r"|\s(?P<set>in|notin)\s*\((?P<values>[^()]*)\))?)\s*(?:,|$)"
)


class Requirement(NamedTuple):
    """One condition on one label."""

    key: str
    operator: str
    """in, notin, exists or absent."""
    values: tuple[str, ...] = ()

    def met(self, labels: Mapping[str, str]) -> bool:
        """Whether labels are as required."""
        if self.operator == "in":
            return labels.get(self.key) in self.values
        if self.operator == "notin":
            return labels.get(self.key) not in self.values
        return (self.key in labels) == (self.operator == "exists")

    def text(self) -> str:
        """As the API server reads it."""
        if self.operator in ("in", "notin"):
            return f"{self.key} {self.operator} ({','.join(self.values)})"
        return self.key if self.operator == "exists" else f"!{self.key}"


class LabelSelector(NamedTuple):
    """Conditions that must all be met; without any, nothing is selected.

    >>> LabelSelector.parse("app=chat,tier notin (test)").matches({"app": "chat"})
    True
    """

    requirements: tuple[Requirement, ...] = ()

    @classmethod
    def parse(cls, text: str) -> LabelSelector:
        """From the text of a scale subresource.

        Raises:
            ValueError: when it is no selector.
        """
        found, place = [], 0
        while place < len(text):
            match = _REQUIREMENT.match(text, place)
            if match is None:
                raise ValueError(f"no label selector: {text[:100]!r}")
            place = match.end()
            if match["absent"]:
                found.append(Requirement(match["absent"], "absent"))
            elif match["equals"]:
                operator = "notin" if match["equals"] == "!=" else "in"
                found.append(Requirement(match["key"], operator, (match["value"],)))
            elif match["set"]:
                values = tuple(sorted(value.strip() for value in match["values"].split(",")))
                found.append(Requirement(match["key"], match["set"], values))
            else:
                found.append(Requirement(match["key"], "exists"))
        return cls(tuple(found))

    @classmethod
    def of(cls, selector: Mapping[str, Any]) -> LabelSelector:
        """From the selector of a Deployment or StatefulSet."""
        found = [Requirement(key, "in", (value,)) for key, value in (selector.get("matchLabels") or {}).items()]
        operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
        found += [
            Requirement(one["key"], operators[one["operator"]], tuple(sorted(one.get("values") or ())))
            for one in selector.get("matchExpressions") or ()
        ]
        return cls(tuple(found))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is selected."""
        return bool(self.requirements) and all(one.met(labels) for one in self.requirements)

    def text(self) -> str:
        """As the API server reads it."""
        return ",".join(one.text() for one in self.requirements)


def covering(selectors: Iterable[LabelSelector]) -> dict[LabelSelector, str]:
    """For each selector the text of a broader one that sees all that it selects; as few texts as there can be.

    >>> sorted(set(covering([LabelSelector.parse("app=a"), LabelSelector.parse("app=b,x=y")]).values()))
    ['app in (a,b)']
    """
    left = sorted({one for one in selectors if one.requirements})
    found: dict[LabelSelector, str] = {}
    while left:
        by_key: dict[str, dict[LabelSelector, tuple[str, ...]]] = {}
        for selector in left:
            for one in selector.requirements:
                if one.operator == "in":
                    by_key.setdefault(one.key, {})[selector] = one.values
        if not by_key:
            return found | {selector: selector.text() for selector in left}
        # The label that most of them name; among those, the one that tells most of them apart.
        key = max(sorted(by_key), key=lambda one: (len(by_key[one]), len(set(by_key[one].values()))))
        text = _broad(key, {value for values in by_key[key].values() for value in values})
        found |= dict.fromkeys(by_key[key], text)
        left = [selector for selector in left if selector not in by_key[key]]
    return found


def _broad(key: str, values: Collection[str]) -> str:
    several = len(values) <= MAX_VALUES
    return Requirement(key, "in" if several else "exists", tuple(sorted(values)) if several else ()).text()
