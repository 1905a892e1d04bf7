"""`jevons run`, `status`, `mode`, `pause`, `resume` and `down`.

Importing this module must stay cheap: the work is imported inside the commands. Orders go through the database, so they
work while a controller is stuck, restarting or elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoscaler.commands.configuration import AsJson, Config, opened

if TYPE_CHECKING:
    from autoscaler.authority.controls import Mode
    from autoscaler.hosting.config import LiveConfig
    from autoscaler.records.database import Database

Services = Annotated[list[str] | None, typer.Argument(help="Services.")]
Everything = Annotated[bool, typer.Option("--all", help="Every service of the configuration.")]


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
    import signal
    import threading

    from autoscaler.hosting.decision_log import configure_logging
    from autoscaler.hosting.service import LiveService

    configure_logging(configs[0].log)
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
    from autoscaler.hosting.status import status_of

    found = status_of(*opened(config))
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
    act: Annotated[bool, typer.Option("--act", help="Resume in act mode, whatever the mode was.")] = False,
) -> None:
    """End pauses and holds after a manual edit; modes stay what they were. With --all release the kill switch."""
    from autoscaler.authority.controls import Controls, Mode

    if everything:
        _kill_switch(config, engage=False)
    elif act:
        _order(services, False, Mode.ACT, config)
    else:
        loaded, database, wanted = _wanted(services, False, config)
        modes = Controls(database).resume(wanted, loaded.mode)
        _say(", ".join(f"{name}: {mode.value}" for name, mode in modes.items()))


def down(config: Config, wait_s: Annotated[float, typer.Option(help="Longest wait, seconds.")] = 60.0) -> None:
    """End the controllers of a configuration; targets stay as they are."""
    from autoscaler.authority.controls import Controls
    from autoscaler.hosting.status import status_of

    loaded, database = opened(config)
    Controls(database).end(loaded.name)
    until_s = time.monotonic() + wait_s
    while time.monotonic() < until_s:
        alive = [row for row in status_of(loaded, database)["controllers"] if row["doing"] in {"acts", "stands by"}]
        if not alive:
            _say(f"{loaded.name}: ended")
            return
        time.sleep(0.5)
    raise OSError(f"{loaded.name}: still says that it runs after {wait_s:g} s; it ends at its next tick")


def _order(services: list[str] | None, everything: bool, to: Mode, path: Path) -> None:
    from autoscaler.authority.controls import Controls

    _, database, wanted = _wanted(services, everything, path)
    Controls(database).set_mode(wanted, to)
    _say(f"{', '.join(wanted)}: {to.value}")


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
        _, database = opened(path)
        controls = Controls(database)
        (controls.kill if engage else controls.revive)()
        done.append("database")
    except (RecordsUnavailable, OSError) as error:
        failed.append(str(error))
    word = "engaged" if engage else "released"
    if failed and (not done or not engage):
        raise OSError(f"the kill switch could not be {word} everywhere: {'; '.join(failed)}")
    _say(f"kill switch {word} ({', '.join(done)})" + "".join(f"; not by {problem}" for problem in failed))


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


COMMANDS: tuple[Callable[..., None], ...] = (run, status, mode, pause, resume, down)
