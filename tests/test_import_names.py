"""Plain package names, and one clear sentence where another project's come first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jevons

ROOT = Path(__file__).resolve().parent.parent


def version(cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jevons", "--version"],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_its_own_packages_are_found() -> None:
    assert jevons.foreign_packages() == {}


@pytest.mark.parametrize("name", jevons.PACKAGES)
def test_another_package_of_that_name_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = version(tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: Jevons needs its own package {name!r}, but Python finds {tmp_path / name}: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_is_no_package_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    done = version(tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_installation_of_links_is_its_own(tmp_path: Path) -> None:
    for name in jevons.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").symlink_to(ROOT / name / "__init__.py")
    (tmp_path / "jevons.py").symlink_to(ROOT / "jevons.py")
    code = "import jevons; print(jevons.__file__, jevons.foreign_packages())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'jevons.py'} {{}}\n"
