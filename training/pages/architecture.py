"""Floors and rooms in ``docs/architecture.md``, from the import contracts and the docstrings of the packages."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from training.pages.tables import table

PACKAGES = ("policies", "envs", "autoscaler", "training")
WITH_FLOORS = ("training", "autoscaler", "envs")


def rooms(root: Path) -> str:
    """Markdown: per package its rooms, with what they must not know, and then the files of each room.

    A room is a folder, or a file that lies in none.

    Args:
        root: folder that holds the packages.

    Raises:
        ValueError: when a package, a folder or a file says nothing of itself.
    """
    parts = []
    for name in PACKAGES:
        package = root / name
        lives, _ = _said(package / "__init__.py")
        folders = [folder for folder in sorted(package.iterdir()) if (folder / "__init__.py").is_file()]
        rows = [(_linked(_of(root, folder)), *_said(folder / "__init__.py")) for folder in folders]
        rows += [(f"`{_of(root, file.with_suffix(''))}`", *_said(file)) for file in _files(package)]
        parts += [f"### `{name}/`", lives, table(("room", "what lives there", "what it must not know"), rows)]
        for folder in folders:
            files = [(f"`{file.stem}`", _said(file)[0]) for file in _files(folder)]
            parts += [f"#### `{_of(root, folder)}/`", table(("file", "what it holds"), files)]
    return "\n\n".join(parts)


def floors(root: Path) -> str:
    """Markdown: the floors of each package that has them, the top one first, from the import contracts.

    Args:
        root: folder of `pyproject.toml`.

    Raises:
        ValueError: when no contract says which floors a package has.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    found = {contract["containers"][0]: contract["layers"] for contract in contracts if "containers" in contract}
    missing = [name for name in WITH_FLOORS if name not in found]
    if missing:
        raise ValueError(f"{root / 'pyproject.toml'}: expected an import contract with the floors of {missing[0]}")
    height = max(len(found[name]) for name in WITH_FLOORS)
    rows = []
    for floor in range(height, 0, -1):
        cells = []
        for name in WITH_FLOORS:
            layers = list(reversed(found[name]))
            rooms_there = layers[floor - 1].split(" | ") if floor <= len(layers) else []
            cells.append(", ".join(f"`{room}`" for room in rooms_there))
        rows.append((str(floor), *cells))
    return table(("floor", *(f"`{name}/`" for name in WITH_FLOORS)), rows)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]


def _of(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _linked(folder: str) -> str:
    """A folder, linked to its heading by the identifier that Markdown readers give it."""
    return f"[`{folder}/`](#{folder.replace('/', '')})"


def _said(source: Path) -> tuple[str, str]:
    """The first paragraph of a module's docstring, and what comes after "must not know" in the rest."""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{source}: expected a docstring that says what lives here")
    text = text.replace("``", "`").replace("|", "\\|")
    unknown = re.search(r"[Mm]ust not know (?:about )?(.+?)\.(?:\s|$)", text, re.DOTALL)
    return _line(text.partition("\n\n")[0]), _line(unknown[1]) if unknown else ""


def _line(text: str) -> str:
    return " ".join(text.split())
