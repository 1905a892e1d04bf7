"""`jevons train`, `export`, `compare` and `promote`.

Importing this module must stay cheap: the work is imported inside the commands.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policies.atomic_files import write_text
from training.commands.console import INTERRUPTED, check_writable, one_sentence_errors, say, training_bars

if TYPE_CHECKING:
    from training.learning.seed_tasks import Where
    from training.learning.train_config import TrainConfig

_ModelName = Annotated[str, typer.Option("--name", help="Registered model.")]
_Tracking = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow server; the embedded store when unset.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for command in (train, export, compare, promote):
        app.command()(one_sentence_errors(command))


def train(
    config: Annotated[
        Path | None,
        typer.Option(
            help="Training configuration, YAML.  [default: the shipped train.yaml, with --from fine_tune.yaml]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.  [default: runs/train, with --from runs/fine-tune]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Environment steps per seed.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed; repeat for several.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="Train on this suite's traces as well.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Fine-tune: champion, learned, a bundle, the folder of a run, or models:/NAME@ALIAS."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Fine-tune on this request log.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="Fine-tune for this service, as in configs/live/services; else as in what-if.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds that learn at once, each in a process.")] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Seeds as tasks of this Ray cluster (auto, ray://HOST:10001); local starts one here."),
    ] = None,
    tracking_uri: _Tracking = None,
) -> None:
    """Train a policy, or fine-tune one on a trace of your own; judge it, and register it as a version in MLflow."""
    from policies.spec import shipped_configs
    from training.learning.train_config import load_train_config

    if (source is None) != (trace is None):
        raise ValueError("--from and --trace go together: the policy to start from, and the traffic to tune it on")
    if source is None and spec is not None:
        raise ValueError("--spec: says which service to fine-tune for; it needs --from and --trace")
    if source is not None and suite is not None:
        raise ValueError("--suite: applies to training from scratch, not to --from")
    tuning = source is not None
    chosen = load_train_config(config or shipped_configs() / ("fine_tune.yaml" if tuning else "train.yaml"))
    changes = {"total_steps": steps, "seeds": tuple(seed) if seed else None, "suite": suite}
    changes["tracking_uri"] = tracking_uri
    chosen = chosen.model_copy(update={name: value for name, value in changes.items() if value is not None})
    folder = out or Path("runs/fine-tune" if tuning else "runs/train")
    if folder.exists() and any(folder.glob("seed-*")) and not resume:
        raise ValueError(f"{folder}: holds a run already: --resume to go on with it, or another --out")
    try:
        if source is not None and trace is not None:
            from training.commands.fine_tune import fine_tune

            fine_tune(chosen, source, trace, spec, folder, resume, (jobs, ray_address))
        else:
            _train(chosen, folder, resume, (jobs, ray_address))
    except KeyboardInterrupt:
        options: list[tuple[str, object]] = [("--config", config), ("--out", out), ("--steps", steps)]
        options += [*(("--seed", value) for value in seed or ()), ("--suite", suite)]
        options += [("--from", source), ("--trace", trace), ("--spec", spec), ("--jobs", jobs if jobs > 1 else None)]
        options += [("--ray-address", ray_address), ("--tracking-uri", tracking_uri)]
        words = [str(word) for name, value in options if value is not None for word in (name, value)]
        say(f"interrupted; go on with: jevons train {shlex.join([*words, '--resume'])}")
        raise typer.Exit(INTERRUPTED) from None


def _train(config: TrainConfig, out: Path, resume: bool, where: Where) -> None:
    from envs.cluster.warm_up import warm_up
    from policies.engine import ConfigError
    from training.learning.seed_tasks import train_seeds
    from training.replaying.scenarios import load_suite
    from training.versions.registry import register as register_version
    from training.versions.registry import store_judgement
    from training.versions.tracking import connect

    # What the policy is judged on is checked before hours of training, not after.
    suite = None if config.evaluation_suite is None else load_suite(config.evaluation_suite)
    for scenario in () if suite is None else suite.scenarios:
        if scenario.spec.interface != config.interface:
            raise ConfigError(
                f"evaluation_suite {config.evaluation_suite}: scenario {scenario.name!r} has another interface "
                "(control interval, metrics delay or action) than the one trained for"
            )
    warm_up(say)
    with training_bars() as (tell, bar):
        best = train_seeds(config, out, resume, tell, bar, where)
        client = connect(config.tracking_uri)
        if suite is not None:
            from training.judging.evaluate import evaluate
            from training.pages.report import write_report

            result = evaluate(
                suite,
                [str(best.bundle), "token-demand", "hpa", "static"],
                on_progress=lambda done, total, _: bar("judging", done, total),
            )
            store_judgement(client, best.run_id, result.to_json(), best.digest)
            write_report(result, out / "report.html")
            client.log_artifact(best.run_id, str(out / "report.html"))
    version = register_version(client, config.name, best.run_id, best.digest)
    print(f"seed {best.seed}: validation score {best.score:.3f}, bundle {best.bundle}")
    print(f"registered as version {version} of {config.name} (alias challenger); next: jevons promote {version}")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished seed, such as runs/train/seed-0.")],
    out: Annotated[Path, typer.Option("--out", help="Bundle to write.")] = Path("policy.zip"),
) -> None:
    """Export a trained policy to a bundle and check that it answers like Stable-Baselines3's predict."""
    from training.learning.export import export as export_run

    check_writable(out)
    digest, difference = export_run(run, out)
    print(f"{out}: digest {digest[:16]}, largest difference to predict {difference:.1e} over 10,000 observations")


def compare(
    name: _ModelName = "jevons-policy",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here as JSON.")] = None,
    tracking_uri: _Tracking = None,
) -> None:
    """Show the registered versions of a policy side by side."""
    from rich.console import Console
    from rich.table import Table

    from training.versions.registry import compare as compare_versions

    check_writable(json_file)
    rows = compare_versions(name, tracking_uri)
    if json_file is not None:
        import json

        text = json.dumps(rows, indent=1) + "\n"
        write_text(json_file, text)
    table = Table(title=f"{name}: registered versions")
    for heading in (
        "version",
        "aliases",
        "validation",
        "holds SLO",
        "attainment",
        "$/M tok",
        "$/M good tok",
        "bundle",
    ):
        table.add_column(heading, justify="left" if heading in {"aliases", "bundle"} else "right")
    for row in rows:
        table.add_row(
            str(row["version"]),
            ", ".join(row["aliases"]),
            _number(row["validation_score"], 3),
            f"{row['holds_slo']}/{row['scenarios']}" if "scenarios" in row else "-",
            _number(row.get("attainment"), 4),
            _number(row.get("usd_per_mtok"), 3),
            _number(row.get("usd_per_good_mtok"), 3),
            row["bundle_digest"][:12],
        )
    Console().print(table)


def promote(
    version: Annotated[str, typer.Argument(help="Version to make champion.")],
    name: _ModelName = "jevons-policy",
    tracking_uri: _Tracking = None,
    sign_with: Annotated[Path | None, typer.Option(help="Private key to sign the bundle with.")] = None,
) -> None:
    """Make a version the champion, if it holds every SLO and is cheaper beyond doubt; else say why not."""
    from training.versions.registry import promote as promote_version

    verdict = promote_version(name, version, tracking_uri, sign_with)
    print(f"version {version} of {name}: {'promoted' if verdict.promote else 'not promoted'}: {verdict.reasons[0]}")
    if not verdict.promote:
        raise typer.Exit(1)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
