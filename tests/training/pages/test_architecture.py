from pathlib import Path

import pytest

from training.pages.architecture import PACKAGES, floors, rooms
from training.pages.readme import replace_block

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "architecture.md"


def test_the_page_holds_floors_and_rooms_as_they_are_now():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_block(text, "rooms", rooms(ROOT)) == text, "run `make architecture`"
    assert replace_block(text, "floors", floors(ROOT)) == text, "run `make architecture`"


def test_a_folder_is_a_row_with_what_it_must_not_know_and_a_table_of_its_files(tmp_path):
    for name in PACKAGES:
        (tmp_path / name / "wing").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text('"""A package."""\n')
        (tmp_path / name / "wing" / "__init__.py").write_text(
            '"""Lives here.\n\nMust not know ``x``\nor y. More.\n"""\n'
        )
        (tmp_path / name / "wing" / "b.py").write_text('"""B."""\n')
        (tmp_path / name / "wing" / "a.py").write_text('"""First.\n\nMore.\n"""\n')
    lines = rooms(tmp_path).splitlines()
    assert lines[:3] == ["### `policies/`", "", "A package."]
    assert "| [`envs/wing/`](#envswing) | Lives here. | `x` or y |" in lines
    assert lines[-6:] == [
        "#### `training/wing/`",
        "",
        "| file | what it holds |",
        "|---|---|",
        "| `a` | First. |",
        "| `b` | B. |",
    ]


def test_a_file_that_says_nothing_of_itself_is_named(tmp_path):
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"policies/__init__\.py: expected a docstring that says what lives here"):
        rooms(tmp_path)
