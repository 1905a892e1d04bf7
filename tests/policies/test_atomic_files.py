from __future__ import annotations

import re
from pathlib import Path

import pytest

from policies.atomic_files import PARTIAL, write_text, write_whole


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    for text in ("first", "ein Ärger"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug")])
def test_whoever_fails_half_way_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "page.md"
    write_text(path, "old")

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        assert list(tmp_path.glob(PARTIAL)) == [partial]
        raise error

    told = f"{path}: cannot be written: No space left on device" if isinstance(error, OSError) else "a bug"
    with pytest.raises(type(error), match=f"^{re.escape(told)}$"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"page\.md: cannot be written: Not a directory$"):
        write_text(tmp_path / "file" / "page.md", "text")
