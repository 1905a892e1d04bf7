"""What ends a fault."""

from __future__ import annotations

from collections.abc import Callable

Undo = Callable[[], object]


def each(*undos: Undo) -> Undo:
    """All of them, in order."""

    def run() -> None:
        for undo in undos:
            undo()

    return run


def nothing() -> None:
    """A fault that is over by itself."""
