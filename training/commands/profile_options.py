"""Options that the commands of `jevons profile` share, and how their text is read.

This module must stay cheap to import, and must not know what the options are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from training.commands.console import check_writable

LARGEST = 1e6
"""Of a coefficient that is given rather than fitted: far beyond any engine."""
_BASE_HELP = "Profile that gives what is not measured: GPUs, limits, cold start, price. A shipped name or a YAML file."
Base = Annotated[str, typer.Option("--base", help=_BASE_HELP)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Profile to write, YAML.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the profile; that of the file when left out.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every figure as JSON to this file.")]
Report = Annotated[Path | None, typer.Option("--report", help="Write tables and plots to this HTML file.")]
Where = Annotated[list[str] | None, typer.Option("--where", help="Keep rows with COLUMN=VALUE; repeatable.")]
Fix = Annotated[
    list[str] | None, typer.Option("--fix", help="COEFFICIENT=VALUE, given rather than fitted; repeatable.")
]
Folds = Annotated[int, typer.Option("--folds", min=0, max=50, help="Parts held out in turn; 0: none.")]
Bootstrap = Annotated[int, typer.Option("--bootstrap", min=0, help="Refits for the coefficients' intervals; 0: none.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of folds and bootstrap.")]
KvTokens = Annotated[int | None, typer.Option("--kv-tokens", min=16, help="KV cache capacity; the base's if left out.")]
Budget = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", min=16, help="Token budget of the engine measured.")
]
Seqs = Annotated[int | None, typer.Option("--max-num-seqs", min=1, max=4096, help="Largest batch of the engine.")]
PerClient = Annotated[
    int | None,
    typer.Option("--requests-per-client", min=1, max=1000, help="How published closed loops were run, where known."),
]
Url = Annotated[str, typer.Option("--url", help="Address of an OpenAI-compatible engine, one replica.")]
Model = Annotated[str | None, typer.Option("--model", help="Model name to ask for; the first listed if left out.")]


def check_outputs(out: Path, *others: Path | None, inputs: Sequence[Path] = ()) -> None:
    """Refuse before any work is done, as `check_writable`; the profile must be named like one.

    Raises:
        ValueError: naming the path.
    """
    if out.suffix not in {".yaml", ".yml"}:
        raise ValueError(f"{out}: expected a name that ends in .yaml, as profiles are found by it")
    check_writable(out, *others, inputs=inputs)


def pairs(given: list[str] | None, flag: str) -> dict[str, str]:
    """NAME=VALUE options by name.

    Raises:
        ValueError: naming the option that is none.
    """
    found = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{flag}: expected NAME=VALUE, got {text!r}")
        if key in found:
            raise ValueError(f"{flag}: {key} is given twice")
        found[key] = value
    return found


def numbers(given: list[str] | None) -> dict[str, float]:
    """The values of ``--fix`` by coefficient.

    Raises:
        ValueError: naming the option that is none.
    """
    from policies.engine import StepModel

    found = {}
    for key, text in pairs(given, "--fix").items():
        if key not in StepModel.model_fields:
            raise ValueError(f"--fix: no coefficient {key!r}; coefficients: {', '.join(StepModel.model_fields)}")
        try:
            found[key] = float(text)
        except ValueError:
            raise ValueError(f"--fix: {key}: expected a number, got {text!r}") from None
        if not 0.0 <= found[key] <= LARGEST or (key == "a_ms" and found[key] == 0.0):
            expected = "above 0" if key == "a_ms" else "of at least 0"
            raise ValueError(f"--fix: {key}: expected a number {expected} and at most a million, got {text}")
    return found


def whole_numbers(text: str, flag: str, low: int = 1, high: int = 1_000_000) -> list[int]:
    """Whole numbers from `low` to `high`, separated by commas.

    Raises:
        ValueError: naming the option.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag}: expected whole numbers separated by commas, got {text!r}") from None
    if min(values) < low or max(values) > high:
        raise ValueError(f"{flag}: expected numbers from {low} to {high:,}, got {text!r}")
    return values
