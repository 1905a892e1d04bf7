"""What is known of a controller from its database: who runs, in which modes and states, and what was last decided.

This module must not know how it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from autoscaler.authority.controls import Controls, Mode, kill_file_engaged
from autoscaler.authority.leases import process_gone
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.presence import ALIVE, RUNNING
from autoscaler.hosting.silence import Silent, ask
from autoscaler.hosting.states import State
from autoscaler.records.database import CONTROLLERS, CONTROLS, DECISIONS, Database
from policies.contract import Reason

STALE_BEATS = 3.0
"""Control intervals without a word after which a controller counts as silent."""
FORGET_BEATS = 40.0
"""Control intervals without a word after which a process leaves the list, unless nobody has come after it."""
NOBODYS = "no controller decides on it"
SEEN_S = 2.0
"""A controller that has spoken so long after a kill file was made has looked for it."""
SILENT = "silent"
"""What is said of one that should say something, and does not."""


def status_of(config: LiveConfig, database: Database, ask_silent: bool = False) -> dict[str, Any]:
    """Controllers, the newest first, and services, as plain data for JSON.

    Args:
        config: whose.
        database: where they say what they do.
        ask_silent: whether those that say nothing any more are asked at their own port, for `silence.ASK_S` at most.

    Raises:
        RecordsUnavailable: when the database cannot be read.
    """
    orders, now_s = Controls(database).read(), time.time()
    names = [spec.service for spec in config.services]
    newest = (
        sa.select(sa.func.max(DECISIONS.c.tick)).where(DECISIONS.c.service.in_(names)).group_by(DECISIONS.c.service)
    )
    with database.begin() as connection:
        rows = connection.execute(CONTROLLERS.select().order_by(CONTROLLERS.c.beat_s.desc())).all()
        decided = connection.execute(
            DECISIONS.select().where(DECISIONS.c.tick.in_(newest), DECISIONS.c.service.in_(names))
        ).all()
        by = {row.service: row.changed_by for row in connection.execute(CONTROLS.select())}
    controllers = _known(rows, config.interval_s, now_s)
    if ask_silent:
        _ask(controllers, config.exposition.host)
    file = kill_file_engaged(config.kill_file)
    unseen = bool(file) and _looks_elsewhere(config, controllers, now_s)
    killed = orders.killed or ("" if unseen else file)
    last = {row.service: row for row in decided}
    services = []
    for name in names:
        row = last.get(name)
        mode = orders.modes.get(name, config.mode)
        services.append(
            {
                "service": name,
                "mode": mode.value,
                **_state(name, mode, by.get(name, ""), killed, controllers),
                "outcome": row.outcome if row else "none yet",
                "reasons": Reason(row.reasons).words() if row else [],
                "replicas_before": row.replicas_before if row else None,
                "replicas_after": row.replicas_after if row else None,
                "seconds_ago": max(now_s - row.time_s, 0.0) if row else None,
            }
        )
    said = [{key: value for key, value in one.items() if key not in INWARD} for one in controllers]
    return {"killed": killed, "kill_file_unseen": file if unseen else "", "controllers": said, "services": services}


def _looks_elsewhere(config: LiveConfig, controllers: Sequence[dict[str, Any]], now_s: float) -> bool:
    """Whether the controllers that run have not seen the kill file of this host: theirs is on another disk or path."""
    running = [one for one in controllers if one["doing"] in RUNNING]
    if config.kill_file is None or not running:
        return False
    try:
        made_s = config.kill_file.stat().st_mtime
    except OSError:
        return False
    return all(not one.get("killed", "?") and now_s - one["seen_s_ago"] > made_s + SEEN_S for one in running)


def own(config: LiveConfig, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The controllers of the configuration among those of `status_of`: others may share the database."""
    ours = {config.shard_name(shard) for shard in range(config.shards)}
    return [row for row in found["controllers"] if row["controller"] in ours]


def unheard(config: LiveConfig, known: Sequence[dict[str, Any]], place: str) -> str:
    """Why an order reaches none of its `own` controllers now, in words; empty where one lives.

    Args:
        config: whose.
        known: what `own` found.
        place: of the database.
    """
    if any(row["doing"] in ALIVE for row in known):
        return ""
    if not known:
        return f"no controller {config.name!r} has ever run with {place}"
    return f"{known[0]['name']} on {known[0]['host']} is {known[0]['doing']}, {known[0]['seen_s_ago']:.0f} s ago"


TOLD = ("states", "leases", "problems", "leads")
"""What a silent controller says at its own port is newer than its row."""
INWARD = {"states", "leases", "process", "silence", "answers"}
"""What the row of a process says for the states of services."""
UNSAID = {
    "controller": "",
    "doing": "?",
    "process": "",
    "states": {},
    "leases": {},
    "leads": 0,
    "services": 0,
    "policy": "?",
    "problems": [],
    "metrics_port": None,
}
"""What the row of a process says that another release, or somebody else, has written."""


def _known(rows: Sequence[Any], interval_s: float, now_s: float) -> list[dict[str, Any]]:
    """What each process said last, the newest first, without those that are gone: ended or long silent, and followed.

    A process of the same controller that has come after it makes a dead one uninteresting; the last one stays, so that
    an operator sees since when nobody runs. Of a silent one that is certainly dead this is so at once; any other may
    wake, and is shown for a while, without the services that others lead by now.
    """
    known: list[dict[str, Any]] = []
    followed: set[str] = set()
    led: set[str] = set()
    for row in rows:
        silent_s = now_s - row.beat_s
        said = {**UNSAID, **(row.status if isinstance(row.status, dict) else {})}
        name = str(said["controller"] or row.name)
        ended = said["doing"] not in ALIVE
        dead = process_gone(said["process"])
        if name in followed and (ended or dead or silent_s > FORGET_BEATS * interval_s):
            continue
        followed.add(name)
        silent = (dead or silent_s > STALE_BEATS * interval_s) and not ended
        states = said["states"]
        leads = said["leads"] if not silent or states.keys() - led else 0
        led |= set() if silent else states.keys()
        doing = SILENT if silent else said["doing"]
        process = row.name.partition("@")[0]
        known.append(
            {
                **said,
                "name": process,
                "host": row.host,
                "seen_s_ago": max(silent_s, 0.0),
                "doing": doing,
                "leads": leads,
            }
        )
    return known


def _ask(controllers: Sequence[dict[str, Any]], address: str) -> None:
    """Put into what is known of silent ones what they say themselves, or what may be the matter."""
    silent = [one for one in controllers if one["doing"] == SILENT and not process_gone(one["process"])]
    answers = ask([Silent(one["process"], one["host"], one["metrics_port"]) for one in silent], address)
    for one, answer in zip(silent, answers, strict=True):
        one |= {key: answer.said[key] for key in TOLD if key in answer.said}
        one |= {"problems": [answer.told, *one["problems"]], "silence": answer.told, "answers": bool(answer.said)}


def _state(
    service: str, mode: Mode, ordered_by: str, killed: str, controllers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """State, reason and end of one service: what is ordered now, else what the controller that leads it has said."""
    running = [one for one in controllers if one["doing"] in RUNNING or one.get("answers")]
    if killed:
        return _as(State.PAUSED, f"kill switch: {killed}; `jevons resume --all` releases it")
    if mode is Mode.PAUSED:
        nobodys = f"; {NOBODYS}" if running and not any(service in one["states"] for one in running) else ""
        return _as(State.PAUSED, f"paused by {ordered_by or 'an order'}; `jevons resume {service}` ends it{nobodys}")
    for one in running:
        found = one["states"].get(service)
        if found is not None:
            return {"state": found["state"], "reason": found["reason"], "until_s": found["until_s"]}
    if running:
        # What keeps the lease of one service from being renewed says nothing about another one.
        own = [one["leases"][service] for one in running if service in one["leases"]]
        problems = own or [problem for one in running if not one["leases"] for problem in one["problems"]]
        return _as(State.HELD, "; ".join([NOBODYS, *problems[:1]]))
    silent = next((one for one in controllers if one["doing"] == SILENT), None)
    if silent is None:
        return _as(State.HELD, "no controller runs")
    why = silent.get("silence") or ("its process is gone" if process_gone(silent["process"]) else "")
    return _as(
        State.HELD, f"its controller has been silent for {silent['seen_s_ago']:.0f} s{f': {why}' if why else ''}"
    )


def _as(state: State, reason: str) -> dict[str, Any]:
    return {"state": state.value, "reason": reason, "until_s": None}
