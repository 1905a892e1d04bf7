"""Pages of the documentation, each written by a command: ``python -m training.commands.pages NAME``.

The Makefile calls these; users of ``jevons`` do not need them. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from policies.atomic_files import write_text
from training.commands.console import one_sentence_errors, progress_bar, say

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = Path("docs")
Bundle = Annotated[Path | None, typer.Option(help="Policy bundle; the one that ships when left out.")]

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_show_locals=False)


@app.command()
@one_sentence_errors
def readme(
    summary: Annotated[Path, typer.Argument(help="summary.json of `jevons demo`.")],
    bench: Annotated[Path, typer.Argument(help="Output of the benchmarks.")],
    page: Annotated[Path, typer.Argument(help="Page whose tables are replaced.")] = Path("README.md"),
) -> None:
    """Write the demo's and the benchmarks' tables into the README."""
    from training.pages.readme import filled

    figures = {
        figure["name"]: figure["value"] for figure in map(json.loads, bench.read_text(encoding="utf-8").splitlines())
    }
    _write(page, filled(page.read_text(encoding="utf-8"), _json(summary), figures))


@app.command()
@one_sentence_errors
def scoreboard(
    details: Annotated[Path, typer.Argument(help="JSON of `jevons evaluate --details`.")],
    page: Annotated[Path, typer.Argument(help="Page to write.")] = DOCS / "scoreboard.md",
) -> None:
    """Write the scoreboard of a suite."""
    from training.pages.scoreboard import page as render

    _write(page, render(_json(details)))


@app.command()
@one_sentence_errors
def robustness(
    disturbed: Annotated[Path, typer.Argument(help="JSON of `jevons robustness`.")],
    ablated: Annotated[Path, typer.Argument(help="JSON of `jevons ablate`.")],
    page: Annotated[Path, typer.Argument(help="Page to write.")] = DOCS / "robustness.md",
) -> None:
    """Write what policies do under disturbance, and what the learned one is worth in parts."""
    from training.pages.robustness import page as render

    _write(page, render(_json(disturbed), _json(ablated)))


@app.command()
@one_sentence_errors
def model_card(
    details: Annotated[
        list[Path] | None, typer.Argument(help="JSON of `jevons evaluate --details`, one file per suite.")
    ] = None,
    bundle: Bundle = None,
    page: Annotated[Path, typer.Option(help="Page to write.")] = DOCS / "model_card.md",
) -> None:
    """Write the model card of a bundle."""
    from policies.learned import load_bundle
    from policies.lineup import SHIPPED_BUNDLE
    from training.pages.model_card import PICTURES, card

    bundle = bundle or SHIPPED_BUNDLE
    path = bundle.resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else bundle.name
    pictures = [file for file in PICTURES if (page.parent / file).is_file()]
    _write(page, card(load_bundle(bundle), name, [_json(file) for file in details or ()], pictures))


@app.command()
@one_sentence_errors
def recipe(bundle: Bundle = None) -> None:
    """Print the configuration of the training run that a bundle came from, for `jevons train --config`."""
    import yaml

    from policies.learned import load_bundle
    from policies.lineup import SHIPPED_BUNDLE

    config = load_bundle(bundle or SHIPPED_BUNDLE).manifest.provenance.get("config", {})
    typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)


@app.command()
@one_sentence_errors
def pictures(
    run: Annotated[
        Path | None, typer.Option(help="Folder of a training run, such as runs/train, for the learning curves.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder where plans are kept.")] = Path("runs/cache"),
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = DOCS / "images",
) -> None:
    """Draw the pictures of the documentation."""
    from envs.cluster.warm_up import warm_up
    from training.judging.evaluate import evaluate
    from training.pages.pictures import PICTURES, burst, learning, read_curves, save
    from training.replaying.result_cache import ResultCache
    from training.replaying.scenarios import load_suite

    curves = read_curves(run) if run is not None else []
    warm_up(say)
    for name, (suite, scenario, policies) in PICTURES.items():
        chosen = load_suite(suite).only([scenario])
        shown = chosen.scenarios[0]
        with progress_bar(f"replaying {scenario}") as on_progress:
            found = evaluate(chosen, policies, on_progress=on_progress, cache=ResultCache(cache))
        lines = {policy: line for (_, policy), line in found.timelines.items()}
        save(burst(lines, f"{scenario}: {shown.description}", shown.slo.attainment), out / f"{name}.svg")
        say(f"wrote {out / name}.svg")
    if curves:
        seeds = "one seed" if len(curves) == 1 else f"{len(curves)} seeds: mean, lowest and highest"
        title = f"Validation of {seeds}: cost with misses; shares of requests in time, of services that hold the SLO"
        save(learning(curves, title), out / "learning.svg")
        say(f"wrote {out / 'learning.svg'}")


@app.command()
@one_sentence_errors
def peers(page: Annotated[Path, typer.Argument(help="Page whose block is replaced.")] = DOCS / "peers.md") -> None:
    """Write what each baseline is, from its own words."""
    from training.pages.peers import page as render

    _replace(page, "peers", render())


@app.command()
@one_sentence_errors
def steadiness(
    found: Annotated[Path, typer.Argument(help="JSON of `jevons steadiness --cost-on`.")],
    page: Annotated[Path, typer.Argument(help="Page whose blocks are replaced.")] = DOCS / "evaluation.md",
) -> None:
    """Write how often the learned policy changes the fleet at a constant load, and what the guardrail costs."""
    from training.pages.readme import replace_block
    from training.pages.steadiness import constant_table, cost_table

    data = _json(found)
    text = replace_block(page.read_text(encoding="utf-8"), "steadiness", constant_table(data))
    _write(page, replace_block(text, "steadiness-cost", cost_table(data)))


@app.command()
@one_sentence_errors
def fidelity(
    reference: Annotated[Path, typer.Option(help="Folder with the measured tables.")],
    unseen: Annotated[
        Path | None, typer.Option(help="Folder with tables of sets that nobody looked at, tested apart.")
    ] = None,
    bench: Annotated[Path | None, typer.Option(help="Output of the benchmarks, for the speed table.")] = None,
    live: Annotated[list[Path] | None, typer.Option(help="JSON of `jevons profile validate --replay`.")] = None,
    page: Annotated[Path, typer.Option(help="Page to write.")] = DOCS / "fidelity.md",
) -> None:
    """Write how far the cluster model is from measured engines."""
    from training.pages.fidelity import notes_of
    from training.pages.fidelity import page as render
    from training.profiling.fidelity import measured_sets, shipped_rows, step_sets

    notes = notes_of(page)
    sets, thin = measured_sets(reference, say)
    fresh = [] if unseen is None else measured_sets(unseen, say)[0]
    _write(page, render(sets, thin, fresh, step_sets(reference, say), shipped_rows(sets), bench, live or [], notes))


@app.command()
@one_sentence_errors
def live_configuration(
    page: Annotated[Path, typer.Argument(help="Page whose block is replaced.")] = DOCS / "live_configuration.md",
) -> None:
    """Write the keys of a live configuration, their defaults and meaning, from its models."""
    from training.pages.live_configuration import keys

    _replace(page, "keys", keys())


@app.command()
@one_sentence_errors
def architecture(
    page: Annotated[Path, typer.Argument(help="Page whose blocks are replaced.")] = DOCS / "architecture.md",
) -> None:
    """Write floors and rooms, from the import contracts and the docstrings of the packages."""
    from training.pages.architecture import floors, rooms
    from training.pages.readme import replace_block

    text = replace_block(page.read_text(encoding="utf-8"), "floors", floors(ROOT))
    _write(page, replace_block(text, "rooms", rooms(ROOT)))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _replace(page: Path, block: str, text: str) -> None:
    from training.pages.readme import replace_block

    _write(page, replace_block(page.read_text(encoding="utf-8"), block, text))


def _write(page: Path, text: str) -> None:
    write_text(page, text)
    say(f"wrote {page}")


if __name__ == "__main__":
    app()
