"""What is known of a controller from its database: who runs, in which modes, and what was last decided.

This module must not know how it is shown.
"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from autoscaler.authority.controls import Controls, kill_file_engaged
from autoscaler.hosting.config import LiveConfig
from autoscaler.records.database import CONTROLLERS, DECISIONS, Database
from policies.contract import Reason

STALE_BEATS = 3.0
"""Control intervals without a word after which a controller counts as silent."""


def status_of(config: LiveConfig, database: Database) -> dict[str, Any]:
    """Controllers, the newest first, and services, as plain data for JSON.

    Raises:
        RecordsUnavailable: when the database cannot be read.
    """
    orders, now_s = Controls(database).read(), time.time()
    names = [spec.service for spec in config.services]
    newest = (
        sa.select(sa.func.max(DECISIONS.c.tick)).where(DECISIONS.c.service.in_(names)).group_by(DECISIONS.c.service)
    )
    with database.begin() as connection:
        controllers = connection.execute(CONTROLLERS.select().order_by(CONTROLLERS.c.beat_s.desc())).all()
        rows = connection.execute(
            DECISIONS.select().where(DECISIONS.c.tick.in_(newest), DECISIONS.c.service.in_(names))
        ).all()
    last = {row.service: row for row in rows}
    stale_s = STALE_BEATS * config.interval_s
    services = []
    for name in names:
        row = last.get(name)
        services.append(
            {
                "service": name,
                "mode": orders.modes.get(name, config.mode).value,
                "outcome": row.outcome if row else "none yet",
                "reasons": Reason(row.reasons).words() if row else [],
                "replicas_before": row.replicas_before if row else None,
                "replicas_after": row.replicas_after if row else None,
                "seconds_ago": now_s - row.time_s if row else None,
            }
        )
    return {
        "killed": kill_file_engaged(config.kill_file) or orders.killed,
        "controllers": [
            {
                "name": row.name,
                "host": row.host,
                **row.status,
                "seen_s_ago": now_s - row.beat_s,
                "doing": row.status["doing"] if now_s - row.beat_s < stale_s else "silent",
            }
            for row in controllers[: 2 * config.shards]
        ],
        "services": services,
    }
