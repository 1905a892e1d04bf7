"""Which parameters of a policy a reference can set (``hpa:target_share=0.6``), and the ranges that a tuner searches.

This module must not know about any one policy, nor how tuning is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from policies.contract import Policy

Setting = float | int | str


@dataclass(frozen=True)
class Parameter:
    """One number or word that a policy takes.

    Attributes:
        name: of the constructor's argument; carries the unit.
        default: as the peer's own documentation has it, where it has one.
        low: lower end of the search range. A user may go beyond it.
        high: upper end of the search range.
        log: search on a logarithmic scale.
        whole: a whole number.
        choices: the words to choose from; the range means nothing then.
        zero: whether 0 is a value that makes sense; below 0 nothing is.
        limit: largest value that makes sense.
        needs_spot: only matters where spot and on-demand pools stand side by side.
        meaning: in a few words, for tables.
    """

    name: str
    default: Setting
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()
    zero: bool = False
    limit: float = math.inf
    needs_spot: bool = False
    meaning: str = ""

    @property
    def expected(self) -> str:
        """What a user may write, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.whole:
            return f"a whole number of at least {0 if self.zero else 1}"
        if self.limit < math.inf:
            return f"a number from 0 to {self.limit:g}" if self.zero else f"a number above 0, at most {self.limit:g}"
        return "a number of at least 0" if self.zero else "a number above 0"

    def parse(self, text: str) -> Setting:
        """The value that a user wrote.

        Raises:
            ValueError: when it is not what is `expected`.
        """
        if self.choices:
            if text not in self.choices:
                raise ValueError
            return text
        number = int(text) if self.whole else float(text)
        if not math.isfinite(number) or number > self.limit or number < 0 or (number == 0 and not self.zero):
            raise ValueError
        return number


class TunablePolicy(Policy, Protocol):
    """A policy that says what can be tuned of it; each parameter is a keyword argument of its constructor."""

    PARAMETERS: ClassVar[tuple[Parameter, ...]]


SPOT_SHARE = Parameter(
    "spot_share",
    0.5,
    low=0.0,
    high=1.0,
    zero=True,
    limit=1.0,
    needs_spot=True,
    meaning="share of the replicas on spot where it is offered",
)
