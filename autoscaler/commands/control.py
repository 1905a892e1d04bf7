"""`jevons run`, `status`, `mode`, `pause`, `resume` and `down`.

Importing this module must stay cheap: the work is imported inside the commands. Orders go through the database, so they
work while a controller is stuck, restarting or elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaler.commands.configuration import AsJson, Config, Configs, opened

if TYPE_CHECKING:
    from autoscaler.authority.controls import Mode
    from autoscaler.hosting.attempts import Run
    from autoscaler.hosting.config import LiveConfig
    from autoscaler.records.database import Database

PIPE_COLUMNS = 240
BACK_S = 45.0
"""`jevons down` waits so long for who has just fallen silent: its host may start it again, seconds."""
QUIET_S = 3.0
"""`jevons down` has seen the end when nobody has been seen for so long: a run that is being started is not seen yet."""
Services = Annotated[list[str] | None, typer.Argument(help="Services.")]
Everything = Annotated[bool, typer.Option("--all", help="Every service of the configuration.")]


def run(
    config: Configs,
    more: Annotated[list[Path] | None, typer.Argument(help="More configurations, as a shell's * gives them.")] = None,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Host on Ray, or in this process.")] = True,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the controllers to a Ray cluster and return.")
    ] = False,
) -> None:
    """Run live controllers; in advise mode until `jevons mode` says otherwise."""
    from autoscaler.authority.controls import DownWatch
    from autoscaler.hosting.attempts import Run, hear
    from autoscaler.hosting.config import load_live_config

    paths = [*config, *(more or [])]
    loaded = [load_live_config(path).located(Path.cwd()) for path in paths]
    names = [one.name for one in loaded]
    if len(set(names)) < len(names):
        raise ValueError(f"two configurations have the name {max(names, key=names.count)!r}; give each its own")
    runs = []
    for path, one in zip(paths, loaded, strict=True):
        down = DownWatch(one.name)
        told = hear(one, down)  # first of all, so that no later order is taken for an earlier one
        if told:
            _say(f"{one.name} is not started: {told} has not seen the last one end; say it again, then start")
        else:
            runs.append(Run(path, one, down))
    from autoscaler.versions.follower import refuse_untrained

    for _, one, _ in runs:
        refuse_untrained(one.policy, one.services[0].interface, one.fallback)
        _say(f"{one.name}: {len(one.services)} services, mode {one.mode.value} unless ordered otherwise")
    if not runs:
        return
    if not ray:
        _run_here(runs)
        return
    from autoscaler.hosting import ray_host

    if detach:
        if loaded[0].ray.address is None:
            raise ValueError("--detach needs a Ray cluster that stays: set ray.address, or run without --detach")
        raise typer.Exit(ray_host.drive(runs, detach=True, say=_say))
    raise typer.Exit(ray_host.supervise(runs, _say))


def _run_here(runs: list[Run]) -> None:
    """All shards as threads of this process, until Ctrl-C, SIGTERM or `jevons down`."""
    import signal
    import threading

    from autoscaler.hosting.attempts import Attempts
    from autoscaler.hosting.presence import Doing
    from autoscaler.hosting.process import prepare
    from autoscaler.hosting.progress import Watchdog

    prepare(runs[0].config.log)
    watchdog = Watchdog()
    shards = [Attempts(one.config, shard, watchdog, one.down) for one in runs for shard in range(one.config.shards)]
    threads = [threading.Thread(target=shard.run, name=shard.name, daemon=True) for shard in shards]

    def stop(*_: object) -> None:
        for shard in shards:
            shard.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
            if any(shard.standing.doing == Doing.FAILED for shard in shards):
                stop()
    failed = [f"{shard.name}: {shard.standing.problem}" for shard in shards if shard.standing.doing == Doing.FAILED]
    if failed:
        raise OSError("; ".join(failed))


def status(config: Config, as_json: AsJson = False) -> None:
    """Show controllers, services, modes and their last decisions."""
    from autoscaler.hosting.status import status_of
    from policies.redaction import scrubbed, shown

    loaded, database = opened(config)
    found = status_of(loaded, database, ask_silent=True)
    if as_json:
        typer.echo(json.dumps(scrubbed(found), indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a pipe has no width: lines stay whole for whoever searches them
        console = Console(width=PIPE_COLUMNS)
    if found["killed"]:
        console.print(f"KILL SWITCH ENGAGED: {shown(found['killed'])}", style="bold red", highlight=False, markup=False)
    if found["kill_file_unseen"]:
        unseen = f"{found['kill_file_unseen']}, and no controller that runs looks at it: it stops nothing"
        console.print(shown(unseen), style="bold yellow", highlight=False, markup=False)
    for controller in found["controllers"]:
        console.print(
            shown(
                f"{controller['name']} on {controller['host']}: {controller['doing']}, "
                f"{controller['seen_s_ago']:.0f} s ago, "
                f"leads {controller['leads']} of {controller['services']} services, policy {controller['policy']}"
            ),
            highlight=False,
            markup=False,
        )
        for problem in controller["problems"]:
            console.print(f"  problem: {shown(problem)}", highlight=False, markup=False)
    if not found["controllers"]:
        console.print(f"no controller has ever run with {shown(database.place)}", highlight=False, markup=False)
    table = Table("service", "state", "why, until", "mode", "replicas", "outcome", "decided", box=None)
    for row in found["services"]:
        ago = "never" if row["seconds_ago"] is None else f"{row['seconds_ago']:.0f} s ago"
        change = "-" if row["replicas_before"] is None else f"{row['replicas_before']} -> {row['replicas_after']}"
        why = row["reason"] + _until(row["until_s"], row["reason"])
        cells = (row["service"], row["state"].upper(), why, row["mode"], change, row["outcome"], ago)
        table.add_row(*(escape(shown(cell)) for cell in cells))
    console.print(table)


def _until(until_s: float | None, reason: str) -> str:
    """``; until 03:12:45 (in 840 s)``, on the clock of this host."""
    if until_s is None or until_s <= time.time():
        return ""
    clock = time.strftime("%H:%M:%S", time.localtime(until_s))
    return f"{'; ' if reason else ''}until {clock} (in {until_s - time.time():.0f} s)"


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

    if everything and services:
        raise ValueError("--all is the kill switch, for every service: name services or --all, not both")
    if everything:
        _kill_switch(config, engage=True)
    else:
        _order(services, False, Mode.PAUSED, config)


def resume(
    config: Config,
    services: Services = None,
    everything: Everything = False,
    act: Annotated[bool, typer.Option("--act", help="Resume in act mode, whatever the mode was.")] = False,
) -> None:
    """End pauses and holds after a manual edit; modes stay what they were. With --all release the kill switch."""
    from autoscaler.authority.controls import Controls, Mode

    if everything and services:
        raise ValueError("--all releases the kill switch, for every service: name services or --all, not both")
    if everything:
        _kill_switch(config, engage=False)
    elif act:
        _order(services, False, Mode.ACT, config)
    else:
        loaded, database, wanted = _wanted(services, False, config)
        modes = Controls(database).resume(wanted, loaded.mode)
        _ordered(loaded, database, ", ".join(f"{name}: {mode.value}" for name, mode in modes.items()), wanted)


def down(
    config: Config,
    wait_s: Annotated[float | None, typer.Option(help="Longest wait, seconds; a minute or more if not given.")] = None,
) -> None:
    """End the controllers of a configuration, also those that wait, restart or start meanwhile; targets stay."""
    from autoscaler.authority.controls import OPEN_S, Controls
    from autoscaler.hosting.presence import ALIVE, RUNNING
    from autoscaler.hosting.status import SILENT, own, status_of, unheard

    loaded, database = opened(config)
    ordered_s = Controls(database).end(loaded.name)
    wait_s = max(60.0, 30.0 + 2.0 * loaded.interval_s) if wait_s is None else wait_s
    until_s, seen_s, quiet_s = time.monotonic() + wait_s, time.monotonic(), min(QUIET_S, wait_s / 2.0)
    while time.monotonic() < until_s:
        known = own(loaded, status_of(loaded, database))
        newest = {row["controller"]: row for row in reversed(known)}.values()  # what waited before it waits no more
        back = any(row["doing"] == SILENT and row["seen_s_ago"] < BACK_S for row in known)
        if back or any(row["doing"] in RUNNING for row in known) or any(row["doing"] in ALIVE for row in newest):
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s >= quiet_s:
            Controls(database).ended(loaded.name, ordered_s)
            if not known:
                raise OSError(f"{unheard(loaded, known, database.place)}: nothing was ended{_elsewhere(database)}")
            stuck = [
                f"; {row['name']} on {row['host']} has been silent for {row['seen_s_ago']:.0f} s, and ends if it wakes"
                for row in known
                if row["doing"] == SILENT
            ]
            _say(f"{loaded.name}: ended{''.join(stuck)}")
            return
        time.sleep(0.5)
    raise OSError(
        f"{loaded.name}: still says that it runs after {wait_s:g} s; it ends at its next tick, and what starts before "
        f"`jevons down` has said that all have ended does, too, for {OPEN_S / 60:g} minutes"
    )


def _order(services: list[str] | None, everything: bool, to: Mode, path: Path) -> None:
    from autoscaler.authority.controls import Controls, Mode

    loaded, database, wanted = _wanted(services, everything, path)
    Controls(database).set_mode(wanted, to)
    _ordered(loaded, database, f"{', '.join(wanted)}: {to.value}", wanted, stops=to is Mode.PAUSED)


def _ordered(
    loaded: LiveConfig, database: Database, said: str, ordered: Collection[str] = (), stops: bool = False
) -> None:
    """Say what was ordered, whether somebody hears it, and whether the kill switch stands above it.

    Raises:
        typer.Exit: with 1 where something should stop, and nobody who could has ever been seen.
    """
    from autoscaler.authority.controls import ANNOTATION
    from autoscaler.hosting.presence import ALIVE
    from autoscaler.hosting.status import NOBODYS, own, status_of, unheard

    found = status_of(loaded, database)
    known = own(loaded, found)
    if not stops:
        said += "; the kill switch is engaged: `jevons resume --all` releases it" if found["killed"] else ""
        mine = str(loaded.kill_file)
        for one in known:  # what it says of the file here is as old as its last tick
            why = str(one.get("killed", "")) if one["doing"] in ALIVE else ""
            if why.startswith("the file ") and mine not in why:
                said += f"; {one['name']} on {one['host']} is stopped by a file of its own: {why}; remove it there"
        services = found["services"]
        lost = [one["service"] for one in services if one["service"] in ordered and one["reason"].startswith(NOBODYS)]
        said += f"; no controller that runs decides on {', '.join(lost)}" if lost else ""
        said += "".join(f"; {one['service']}: {one['reason']}" for one in services if ANNOTATION in one["reason"])
    _say(said)
    nobody = unheard(loaded, known, database.place)
    if nobody:
        _say(f"nobody hears this yet: {nobody}; it waits there for whoever starts{_elsewhere(database)}")
        if stops and not known:
            raise typer.Exit(1)


def _elsewhere(database: Database) -> str:
    """Why the controller that is meant may read another database."""
    if database.engine.url.get_backend_name() != "sqlite":
        return ""
    return "; a path in records.url that is not absolute counts from the folder in which a command runs"


def _wanted(services: list[str] | None, everything: bool, path: Path) -> tuple[LiveConfig, Database, list[str]]:
    """The configuration, its database, and the services that an order is for."""
    loaded, database = opened(path)
    known = [spec.service for spec in loaded.services]
    wanted = known if everything else list(services or [])
    if not wanted:
        raise ValueError("name at least one service, or --all")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{path}: no service named {unknown[0]!r}; there are {', '.join(known[:10])}")
    return loaded, database, wanted


def _kill_switch(path: Path, engage: bool) -> None:
    """Both ways at once: the file works without the database, the database without this host's disk."""
    from autoscaler.authority.controls import Controls
    from autoscaler.controller import RecordsUnavailable
    from autoscaler.hosting.config import load_live_config

    loaded = load_live_config(path).located(Path.cwd())
    done, failed, database, absent = [], [], None, False
    if loaded.kill_file is not None:
        try:
            if engage:
                loaded.kill_file.parent.mkdir(parents=True, exist_ok=True)
                loaded.kill_file.touch()
            else:
                absent = not loaded.kill_file.exists()
                loaded.kill_file.unlink(missing_ok=True)
            done.append(f"file {loaded.kill_file}" + ", which was not there" * absent)
        except OSError as error:
            failed.append(f"file {loaded.kill_file}: {error.strerror or error}")
    try:
        _, database = opened(path)
        controls = Controls(database)
        (controls.kill if engage else controls.revive)()
        done.append("database")
    except (RecordsUnavailable, OSError) as error:
        failed.append(str(error))
    word = "engaged" if engage else "released"
    if failed and (not done or not engage):
        raise OSError(f"the kill switch could not be {word} everywhere: {'; '.join(failed)}")
    said = f"kill switch {word} ({', '.join(done)})" + "".join(f"; not by {problem}" for problem in failed)
    if database is None:
        _say(said)
    else:
        _ordered(loaded, database, said, stops=engage)


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


COMMANDS: tuple[Callable[..., None], ...] = (run, status, mode, pause, resume, down)
