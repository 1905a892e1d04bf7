"""`jevons run`, `status`, `explain`, `pause`, `resume`, `mode`, `down` and `replay`.

Importing this module must stay cheap: the work is imported inside the commands. Orders go through the database, so they
work while a controller is stuck, restarting or elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from autoscaler.hosting.config import LiveConfig
    from autoscaler.records.database import Database

Config = Annotated[Path, typer.Option("--config", envvar="JEVONS_CONFIG", help="Live configuration, YAML.")]
Services = Annotated[list[str] | None, typer.Argument(help="Services.")]
Everything = Annotated[bool, typer.Option("--all", help="Every service of the configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STALE_BEATS = 3.0
"""Control intervals without a word after which a controller counts as silent."""


def run(
    config: Annotated[
        list[Path], typer.Option("--config", envvar="JEVONS_CONFIG", help="Live configuration, YAML; repeatable.")
    ],
    more: Annotated[list[Path] | None, typer.Argument(help="More configurations, as a shell's * gives them.")] = None,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Host on Ray, or in this process.")] = True,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the controllers to a Ray cluster and return.")
    ] = False,
) -> None:
    """Run live controllers; in advise mode until `jevons mode` says otherwise."""
    from autoscaler.hosting.config import load_live_config

    paths = [*config, *(more or [])]
    loaded = [load_live_config(path).located(Path.cwd()) for path in paths]
    names = [one.name for one in loaded]
    if len(set(names)) < len(names):
        raise ValueError(f"two configurations have the name {max(names, key=names.count)!r}; give each its own")
    for one in loaded:
        _say(f"{one.name}: {len(one.services)} services, mode {one.mode.value} unless ordered otherwise")
    if not ray:
        _run_here(loaded)
        return
    from autoscaler.hosting import ray_host

    if detach:
        if loaded[0].ray.address is None:
            raise ValueError("--detach needs a Ray cluster that stays: set ray.address, or run without --detach")
        ray_host.drive(loaded, detach=True, say=_say)
        return
    raise typer.Exit(ray_host.supervise(paths, _say))


def _run_here(configs: list[LiveConfig]) -> None:
    """All shards as threads of this process, until Ctrl-C, SIGTERM or `jevons down`."""
    import logging
    import signal
    import threading

    from autoscaler.hosting.service import LiveService

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    services = [LiveService(config, shard) for config in configs for shard in range(config.shards)]
    threads = [threading.Thread(target=service.run, name=service.name, daemon=True) for service in services]

    def stop(*_: object) -> None:
        for service in services:
            service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
    if any(not service.clock.stopped for service in services):
        raise OSError("a controller has given up; its log says why")


def status(config: Config, as_json: AsJson = False) -> None:
    """Show controllers, services, modes and their last decisions."""
    found = _status(*_open(config))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if found["killed"]:
        console.print(f"KILL SWITCH ENGAGED: {found['killed']}", style="bold red", highlight=False)
    for controller in found["controllers"]:
        console.print(
            f"{controller['name']} on {controller['host']}: {controller['doing']}, "
            f"{controller['seen_s_ago']:.0f} s ago, "
            f"leads {controller['leads']} of {controller['services']} services, policy {controller['policy']}",
            highlight=False,
            markup=False,
        )
        for problem in controller["problems"]:
            console.print(f"  problem: {problem}", highlight=False, markup=False)
    if not found["controllers"]:
        console.print("no controller has ever run with this database")
    table = Table("service", "mode", "replicas", "outcome", "reasons", "decided", box=None)
    for row in found["services"]:
        ago = "never" if row["seconds_ago"] is None else f"{row['seconds_ago']:.0f} s ago"
        change = "-" if row["replicas_before"] is None else f"{row['replicas_before']} -> {row['replicas_after']}"
        table.add_row(row["service"], row["mode"], change, row["outcome"], ", ".join(row["reasons"]), ago)
    console.print(table)


def _status(config: LiveConfig, database: Database) -> dict[str, Any]:
    import sqlalchemy as sa

    from autoscaler.authority.controls import Controls, kill_file_engaged
    from autoscaler.records.database import CONTROLLERS, DECISIONS
    from policies.contract import Reason

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


def explain(
    service: Annotated[str, typer.Argument(help="Service.")],
    config: Config,
    tick: Annotated[int | None, typer.Option(help="Tick to explain; the newest when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say in words what was seen, proposed, settled and done, and why."""
    from autoscaler.records.decisions import read_outcome, read_ticks
    from autoscaler.records.explain import explained, in_words

    loaded, database = _open(config)
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
    typer.echo(json.dumps(found, indent=1) if as_json else in_words(found))


def mode(
    service: Annotated[str, typer.Argument(help="Service, or `all`.")],
    to: Annotated[str, typer.Argument(help="advise, act or paused.")],
    config: Config,
) -> None:
    """Say what the controller may do for a service: advise, act or paused."""
    from autoscaler.authority.controls import Mode

    if to not in set(Mode):
        raise ValueError(f"mode {to!r}: expected advise, act or paused")
    _order([service] if service != "all" else None, service == "all", Mode(to), config)


def pause(config: Config, services: Services = None, everything: Everything = False) -> None:
    """Pause services; with --all engage the kill switch, which works even while the controller is stuck."""
    from autoscaler.authority.controls import Mode

    if everything:
        _kill_switch(config, engage=True)
    else:
        _order(services, False, Mode.PAUSED, config)


def resume(
    config: Config,
    services: Services = None,
    everything: Everything = False,
    act: Annotated[bool, typer.Option("--act", help="Resume in act mode; in the configured mode otherwise.")] = False,
) -> None:
    """Resume services, ending a hold after a manual edit; with --all release the kill switch."""
    from autoscaler.authority.controls import Mode
    from autoscaler.hosting.config import load_live_config

    if everything:
        _kill_switch(config, engage=False)
    else:
        _order(services, False, Mode.ACT if act else load_live_config(config).mode, config)


def down(config: Config, wait_s: Annotated[float, typer.Option(help="Longest wait, seconds.")] = 60.0) -> None:
    """End the controllers of a configuration; targets stay as they are."""
    from autoscaler.authority.controls import Controls

    loaded, database = _open(config)
    Controls(database).end(loaded.name)
    until_s = time.monotonic() + wait_s
    while time.monotonic() < until_s:
        alive = [row for row in _status(loaded, database)["controllers"] if row["doing"] in {"acts", "stands by"}]
        if not alive:
            _say(f"{loaded.name}: ended")
            return
        time.sleep(0.5)
    raise OSError(f"{loaded.name}: still says that it runs after {wait_s:g} s; it ends at its next tick")


def replay(
    config: Config,
    policy: Annotated[str, typer.Option(help="Policy to replay, as in `jevons evaluate --policy`.")],
    hours: Annotated[float, typer.Option(help="How far back, hours.")] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Run recorded snapshots through another policy and compare its targets with the record."""
    from autoscaler.records.decisions import read_ticks
    from autoscaler.records.replay import replay as replay_ticks
    from autoscaler.records.replay import summary
    from policies.decider import Decider
    from policies.fleet import Fleet
    from policies.lineup import make_policy

    loaded, database = _open(config)
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


def _order(services: list[str] | None, everything: bool, to: Any, path: Path) -> None:
    from autoscaler.authority.controls import Controls

    loaded, database = _open(path)
    known = [spec.service for spec in loaded.services]
    wanted = known if everything else list(services or [])
    if not wanted:
        raise ValueError("name at least one service, or --all")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{path}: no service named {unknown[0]!r}; there are {', '.join(known[:10])}")
    Controls(database).set_mode(wanted, to)
    _say(f"{', '.join(wanted)}: {to.value}")


def _kill_switch(path: Path, engage: bool) -> None:
    """Both ways at once: the file works without the database, the database without this host's disk."""
    from autoscaler.authority.controls import Controls
    from autoscaler.controller import RecordsUnavailable
    from autoscaler.hosting.config import load_live_config

    loaded = load_live_config(path).located(Path.cwd())
    done, failed = [], []
    if loaded.kill_file is not None:
        try:
            if engage:
                loaded.kill_file.parent.mkdir(parents=True, exist_ok=True)
                loaded.kill_file.touch()
            else:
                loaded.kill_file.unlink(missing_ok=True)
            done.append(f"file {loaded.kill_file}")
        except OSError as error:
            failed.append(f"file {loaded.kill_file}: {error.strerror or error}")
    try:
        _, database = _open(path)
        controls = Controls(database)
        (controls.kill if engage else controls.revive)()
        done.append("database")
    except (RecordsUnavailable, OSError) as error:
        failed.append(str(error))
    word = "engaged" if engage else "released"
    if failed and (not done or not engage):
        raise OSError(f"the kill switch could not be {word} everywhere: {'; '.join(failed)}")
    _say(f"kill switch {word} ({', '.join(done)})" + "".join(f"; not by {problem}" for problem in failed))


def _open(path: Path) -> tuple[LiveConfig, Database]:
    from autoscaler.controller import RecordsUnavailable
    from autoscaler.hosting.config import load_live_config
    from autoscaler.records.database import Database

    loaded = load_live_config(path).located(Path.cwd())
    database = Database(loaded.database_url)
    try:
        database.create()
    except RecordsUnavailable as error:
        raise OSError(str(error)) from None
    return loaded, database


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


COMMANDS: tuple[Callable[..., None], ...] = (run, status, explain, mode, pause, resume, down, replay)
