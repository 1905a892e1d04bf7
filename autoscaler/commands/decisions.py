"""`jevons explain` and `jevons replay`: recorded decisions, in words and through another policy.

Importing this module must stay cheap: the work is imported inside the commands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated

import typer

from autoscaler.commands.configuration import AsJson, Config, opened


def explain(
    service: Annotated[str, typer.Argument(help="Service.")],
    config: Config,
    tick: Annotated[int | None, typer.Option(help="Tick to explain; the newest when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say in words what was seen, proposed, settled and done, and why."""
    from autoscaler.records.explain import explained, in_words
    from autoscaler.records.ticks import read_outcome, read_ticks
    from policies.redaction import shown

    loaded, database = opened(config)
    spec = next((spec for spec in loaded.services if spec.service == service), None)
    if spec is None:
        raise ValueError(f"{config}: no service named {service!r}")
    ticks = read_ticks(database, service, tick=tick, last=1)
    if not ticks:
        where = "" if tick is None else f" at tick {tick}"
        raise ValueError(f"no decision for {service!r} is recorded{where}")
    outcome, reasons = read_outcome(database, ticks[0].id, service)
    pools = [pool.label for pool in spec.pools]
    found = explained(ticks[0], service, outcome, reasons, pools)
    words = "\n".join(shown(line) for line in in_words(found).split("\n"))  # a hold names what others have named
    typer.echo(json.dumps(found, indent=1) if as_json else words)


def replay(
    config: Config,
    policy: Annotated[str, typer.Option(help="Policy to replay, as in `jevons evaluate --policy`.")],
    hours: Annotated[float, typer.Option(help="How far back, hours.")] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Run recorded snapshots through another policy and compare its targets with the record."""
    from autoscaler.records.replay import replay as replay_ticks
    from autoscaler.records.replay import summary
    from autoscaler.records.ticks import read_ticks
    from policies.decider import Decider
    from policies.fleet import Fleet
    from policies.lineup import make_policy

    loaded, database = opened(config)
    ticks = read_ticks(database, since_s=time.time() - hours * 3600.0)
    if not ticks:
        raise ValueError(f"no decision of the last {hours:g} hours is recorded")
    specs = loaded.services
    fleet = Fleet.from_specs(specs)
    decider = Decider(fleet, specs[0].interface.window, specs[0].guardrails)
    rows = summary(replay_ticks(ticks, specs, decider, make_policy(policy, fleet, specs)), specs)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("service", "ticks", "different", "replicas", "recorded", "$/h", "recorded $/h", box=None)
    for row in rows:
        numbers = (row["replicas"], row["recorded_replicas"], row["usd_per_hour"], row["recorded_usd_per_hour"])
        table.add_row(
            row["service"], str(row["ticks"]), str(row["different"]), *(f"{number:.2f}" for number in numbers)
        )
    Console().print(table)


COMMANDS: tuple[Callable[..., None], ...] = (explain, replay)
"""What the root adds."""
