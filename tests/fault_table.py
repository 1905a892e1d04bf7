"""``python -m tests.fault_table PAGE``: the table of faults in the documentation, from the tests that play them.

A test says which fault it plays and what must happen: ``@pytest.mark.plays("database locked", "held")``. Several tests
may play one fault, of which one says what must happen, and one test may play several.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.kinds import KINDS
from tests.chaos.real_world import PLAYS as REAL
from tests.chaos.virtual_world import PLAYS as VIRTUAL
from training.pages.readme import replace_block

TESTS = Path(__file__).resolve().parent
MARK = "plays"


def declared(folder: Path = TESTS) -> Iterator[tuple[str, str, str]]:
    """(fault, what must happen or nothing, test file) of every mark, `test_faults` first."""
    files = sorted(folder.rglob("test_*.py"), key=lambda file: (file.stem != "test_faults", file.stem))
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == f"pytest.mark.{MARK}":
                        fault, *happens = (ast.literal_eval(argument) for argument in mark.args)
                        yield fault, "".join(happens), file.stem


def faults() -> str:
    """Rows by fault.

    Raises:
        ValueError: when no test, or more than one, says what must happen.
    """
    happens: dict[str, str] = {}
    tests: dict[str, list[str]] = {}
    for fault, what, test in declared():
        if what and happens.get(fault):
            raise ValueError(f"{test}: {fault!r}: what must happen is said twice")
        happens[fault] = happens.get(fault) or what
        if test not in tests.setdefault(fault, []):
            tests[fault].append(test)
    untold = sorted(fault for fault, what in happens.items() if not what)
    if untold:
        raise ValueError(f"no test says what must happen: {', '.join(untold)}")
    rows = [
        f"| {fault} | {what} | {', '.join(f'`{test}`' for test in tests[fault])} |" for fault, what in happens.items()
    ]
    return "\n".join(["| Fault | What happens | Test |", "|---|---|---|", *rows])


def drawn() -> str:
    """What the hostile suite draws, and in which worlds."""
    rows = [
        f"| {kind.words} | {'yes' if name in VIRTUAL else ''} | {'yes' if name in REAL else ''} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(["| Fault | Virtual clock | Real servers |", "|---|---|---|", *rows])


def page(text: str) -> str:
    """The page with both tables as they should be."""
    return replace_block(replace_block(text, "faults", faults()), "hostile", drawn())


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
