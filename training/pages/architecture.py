"""The table of rooms in ``docs/architecture.md``, from the docstrings of the packages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from training.pages.tables import table

PACKAGES = ("policies", "envs", "autoscaler", "training")
HEADINGS = ("room", "what lives there", "what it must not know", "files")


def rooms(root: Path) -> str:
    """Markdown: per package a sentence and a table, a row for each folder and for each file that lies in none.

    Args:
        root: folder that holds the packages.

    Raises:
        ValueError: when a package or a file says nothing of itself.
    """
    parts = []
    for name in PACKAGES:
        package = root / name
        lives, _ = _said(package / "__init__.py")
        folders = [folder for folder in sorted(package.iterdir()) if (folder / "__init__.py").is_file()]
        files = [file for file in sorted(package.glob("*.py")) if file.stem != "__init__"]
        rows = [_row(f"`{name}/{folder.name}/`", folder / "__init__.py", _names(folder)) for folder in folders]
        rows += [_row(f"`{name}/{file.stem}`", file, "") for file in files]
        parts += [f"### `{name}/`", lives, table(HEADINGS, rows)]
    return "\n\n".join(parts)


def _row(room: str, source: Path, files: str) -> tuple[str, ...]:
    return (room, *_said(source), files)


def _names(folder: Path) -> str:
    return ", ".join(f"`{file.stem}`" for file in sorted(folder.glob("*.py")) if file.stem != "__init__")


def _said(source: Path) -> tuple[str, str]:
    """The first paragraph of a module's docstring, and what comes after "must not know" in the rest."""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{source}: expected a docstring that says what lives here")
    text = text.replace("``", "`").replace("|", "\\|")
    unknown = re.search(r"[Mm]ust not know (.+?)\.(?:\s|$)", text, re.DOTALL)
    return _line(text.partition("\n\n")[0]), _line(unknown[1]) if unknown else ""


def _line(text: str) -> str:
    return " ".join(text.split())
