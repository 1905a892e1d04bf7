"""`jevons sweep`: search the hyper-parameters of a recipe.

Importing this module must stay cheap: the work is imported inside the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.console import one_sentence_errors, say, training_bars


@one_sentence_errors
def sweep(
    config: Annotated[Path, typer.Option(help="What to search, YAML.")] = Path("configs/sweep.yaml"),
    out: Annotated[Path, typer.Option(help="Folder of the sweep; one that was cut off goes on.")] = Path("runs/sweep"),
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once, each in a process.")] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Trials as tasks of this Ray cluster (auto, ray://HOST:10001); local starts one here."),
    ] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server; the embedded store when left out.")] = None,
) -> None:
    """Find the hyper-parameters of a recipe that give the best validation score."""
    from envs.cluster.warm_up import warm_up
    from training.learning.sweep import BEST_FILE, load_sweep, run_sweep

    spec, recipe = load_sweep(config)
    if trials is not None:
        spec = spec.model_copy(update={"trials": trials})
    if tracking_uri is not None:
        recipe = recipe.model_copy(update={"tracking_uri": tracking_uri})
    warm_up(say)
    with training_bars() as (tell, bar):
        best = run_sweep(spec, recipe, out, tell, bar, (jobs, ray_address))
    print(f"best of {spec.trials} trials: score {best.value:.3f}")
    for name, value in best.user_attrs["settings"].items():
        print(f"  {name}: {value}")
    print(f"its recipe: {out / BEST_FILE}; next: jevons train --config {out / BEST_FILE}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)
