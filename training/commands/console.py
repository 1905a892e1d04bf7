"""What the command line prints: tables on stdout, progress and errors on stderr; and how it ends.

Only typer is imported at the top (rich alone takes a tenth of a second), so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from policies.atomic_files import write_text

if TYPE_CHECKING:
    from training.replaying.workers import Progress

P = ParamSpec("P")
BAD_INPUT, INTERRUPTED = 2, 130


def say(sentence: str) -> None:
    """One line on stderr."""
    typer.echo(sentence, err=True)


def comma_separated(texts: Sequence[str]) -> list[str]:
    """Words of a comma-separated, repeatable option.

    >>> comma_separated(["chat, code", "reasoning"])
    ['chat', 'code', 'reasoning']
    """
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def one_sentence_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn bad input into one sentence on stderr and exit code 2, and Ctrl-C into one line and exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from policies.learned import BundleMismatch
        from policies.redaction import shown

        try:
            command(*args, **kwargs)
        except (ValueError, BundleMismatch, OSError) as error:  # ConfigError and TraceError are ValueErrors
            sentence = shown(" ".join(str(error).split()))
            say(f"error: {sentence or type(error).__name__}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all, and say so.

    Raises:
        OSError: when it cannot be written.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
    say(f"wrote {path}")


def check_writable(*paths: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """Refuse before any work is done.

    Args:
        paths: files to write; None stands for none.
        inputs: files that must not be overwritten by them.

    Raises:
        ValueError: when a path's folder does not exist or cannot be written to, when the path is a folder, or when
            two results, or a result and an input, would be the same file.
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected a file to write")
        if path.resolve() in taken:
            raise ValueError(f"{path}: is named twice, and would overwrite what another option or argument names")
        taken.add(path.resolve())
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def progress_bar(doing: str) -> Iterator[Progress]:
    """A bar on stderr that long work can tell its progress; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, step: bar.update(task, completed=done, total=total, description=step)


@contextmanager
def training_bars() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """What training tells its progress: a function for messages, and one for bars (label, done, total), on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=min(done, total))

        yield progress.console.print, bar
