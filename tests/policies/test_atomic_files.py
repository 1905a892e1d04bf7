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


def test_a_link_that_somebody_put_there_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "page.md"
    victim.write_text("theirs")
    path.symlink_to(victim)
    write_text(path, "ours")  # the link is replaced, not what it leads to
    assert (path.read_text(), path.is_symlink(), victim.read_text()) == ("ours", False, "theirs")

    monkeypatch.setattr("policies.atomic_files.secrets.token_hex", lambda _: "guessed")
    partial = tmp_path / ".page.md.guessed.partial"
    partial.symlink_to(victim)
    with pytest.raises(OSError, match="cannot be written: File exists"):
        write_text(path, "new")
    assert (path.read_text(), victim.read_text(), partial.is_symlink()) == ("ours", "theirs", True)


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"page\.md: cannot be written: Not a directory$"):
        write_text(tmp_path / "file" / "page.md", "text")
