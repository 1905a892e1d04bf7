"""The log of a live controller: a line per decision that differs from the last one, and per problem that comes or goes.

A service that is held for the same reason tick after tick is one line, not thousands.
This module must not know how decisions are made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from autoscaler.problem_texts import kind
from policies.contract import Decision, Outcome, Reason
from policies.pool_arrays import any_pool
from policies.redaction import scrubbed, shown

LOG = logging.getLogger("jevons")
LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, message, and the fields of a decision where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(scrubbed(line))


class TextLines(logging.Formatter):
    """One line of text per record, and a traceback where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The line."""
        return shown(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the library's name
        """The traceback; no line of it can pass for one of ours."""
        return "\n".join(shown(line) for line in super().formatException(ei).split("\n"))


def configure_logging(form: LogFormat) -> None:
    """Send the log of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class DecisionLog:
    """Logs what changes.

    Args:
        services: names.
        pools: names of each service's pools.
    """

    def __init__(self, services: Sequence[str], pools: Sequence[Sequence[str]]) -> None:
        self._services = tuple(services)
        self._pools = tuple(tuple(names) for names in pools)
        self._last: Decision | None = None
        self._problems: dict[str, str] = {}

    def decided(self, decision: Decision) -> None:
        """A line for each service whose outcome, reasons or target differ from those of the last tick."""
        last, self._last = self._last, decision
        changed = np.ones(len(decision.outcome), bool)
        if last is not None:
            changed = (
                (decision.outcome != last.outcome)
                | (decision.reasons != last.reasons)
                | any_pool(decision.settled.replicas != last.settled.replicas)
                | any_pool(decision.settled.batch_cap != last.settled.batch_cap)
            )
        for row in np.flatnonzero(changed).tolist():
            fields = self._fields(decision, row)
            LOG.info(_sentence(fields), extra={"fields": fields})

    def troubled(self, problems: Iterable[str]) -> None:
        """A line for each problem that was not there at the last tick, and for each that is gone.

        One whose times and measured values change is the same one.
        """
        now: dict[str, str] = {}
        for problem in sorted(problems):
            now.setdefault(kind(problem), problem)
        for one in sorted(now.keys() - self._problems.keys()):
            LOG.warning(now[one])
        for one in sorted(self._problems.keys() - now.keys()):
            LOG.info("no longer: %s", self._problems[one])
        self._problems = {one: self._problems.get(one, problem) for one, problem in now.items()}

    def _fields(self, decision: Decision, row: int) -> dict[str, Any]:
        def by_pool(values: Any) -> dict[str, Any]:
            return {pool: int(values[row, column]) for column, pool in enumerate(self._pools[row])}

        held = decision.outcome[row] == Outcome.HELD  # the target of a held row may mean nothing
        settled = decision.settled
        target = {} if held else {"replicas": by_pool(settled.replicas), "batch_cap": by_pool(settled.batch_cap)}
        return {
            "service": self._services[row],
            "outcome": Outcome(int(decision.outcome[row])).name.lower(),
            "reasons": Reason(int(decision.reasons[row])).words(),
            "policy": decision.policy,
            **target,
        }


def _sentence(fields: dict[str, Any]) -> str:
    """``chat scaled: h100 4 (cap 64); backlog``."""
    pools = [
        f"{pool} {replicas} (cap {fields['batch_cap'][pool]})" for pool, replicas in fields.get("replicas", {}).items()
    ]
    target = f": {', '.join(pools)}" if pools else ""
    why = f"; {', '.join(fields['reasons'])}" if fields["reasons"] else ""
    return f"{fields['service']} {fields['outcome']}{target}{why}"
