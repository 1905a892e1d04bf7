"""Where compiled kernels are kept, and that the user is told once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from envs.cluster import kernel_cache, warm_up


@pytest.fixture(name="sources")
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the kernel sources that the cache believes to be its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in kernel_cache.KERNEL_SOURCES:
        shutil.copy(Path(kernel_cache.__file__).with_name(name), folder)
    monkeypatch.setattr(kernel_cache, "__file__", str(folder / "kernel_cache.py"))
    monkeypatch.setenv("JEVONS_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def test_the_folder_is_the_same_for_the_same_sources(sources: Path) -> None:
    folder = kernel_cache._folder()
    assert kernel_cache._folder() == folder
    assert folder.is_dir()
    assert folder.parent == sources.parent / "cache" / "jevons"


@pytest.mark.parametrize("name", kernel_cache.KERNEL_SOURCES)
def test_an_edit_of_any_kernel_source_gives_another_folder(sources: Path, name: str) -> None:
    before = kernel_cache._folder()
    with (sources / name).open("a") as file:
        file.write("# edited\n")
    assert kernel_cache._folder() != before


def test_every_module_that_defines_kernels_is_a_source() -> None:
    """Else an edit of it would run old machine code."""
    folder = Path(kernel_cache.__file__).parent
    compiled = {path.name for path in folder.glob("*.py") if "@njit" in path.read_text()}
    assert {*compiled, "state.py"} == set(kernel_cache.KERNEL_SOURCES)


def test_another_numba_gives_another_folder(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_cache._folder()
    monkeypatch.setattr(kernel_cache.numba, "__version__", "0.0.1")
    assert kernel_cache._folder() != before


def test_without_an_own_folder_the_cache_of_the_user_is_taken(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JEVONS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache._folder().parent == tmp_path / "xdg" / "jevons"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kernel_cache._folder().parent == tmp_path / "home" / ".cache" / "jevons"


def test_a_cache_that_cannot_be_made_falls_back_to_a_temporary_folder(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("JEVONS_CACHE_DIR", str(blocked))
    folder = kernel_cache._folder()
    try:
        assert folder.is_dir()
        assert folder.name.startswith("jevons-kernels-")
        assert blocked not in folder.parents
    finally:
        folder.rmdir()


def test_warm_up_says_one_line_the_first_time_and_nothing_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "FOLDER", tmp_path)
    said: list[str] = []
    warm_up.warm_up(said.append)
    warm_up.warm_up(said.append)
    assert said == ["Compiling the cluster model for this machine (about half a minute, once) ..."]
