"""Whatever a path turns out to name, reading it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoscaler.versions.signatures import Trust, make_keys, sign_file, signature_file
from policies.bounded_files import TooLarge, read_bounded
from policies.engine import ConfigError
from policies.learned import BundleMismatch, load_bundle
from policies.lineup import SHIPPED_BUNDLE

KINDS = ("fifo", "endless", "folder", "sparse", "missing")
pytestmark = pytest.mark.timeout(60)


def made(kind: str, path: Path) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(8 << 30)
    return path


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    assert read_bounded(tmp_path / "file", 10) == bytes(10)
    with pytest.raises(TooLarge, match="larger than 9 bytes"):
        read_bounded(tmp_path / "file", 9)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_waited_for_or_read_to_its_end(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match=r"no regular file|larger than 1000 bytes|Is a directory|No such file"):
        read_bounded(made(kind, tmp_path / "it"), 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_bundles_signatures_and_keys_are_read_that_way(tmp_path: Path, kind: str) -> None:
    odd = made(kind, tmp_path / "it")
    with pytest.raises(BundleMismatch, match="it: "):
        load_bundle(odd)
    with pytest.raises(BundleMismatch, match="it: "):
        sign_file(odd, tmp_path / "key")
    with pytest.raises(ConfigError, match="it: cannot be read: "):
        Trust([odd])
    bundle = tmp_path / "policy.zip"
    bundle.write_bytes(SHIPPED_BUNDLE.read_bytes())
    made(kind, signature_file(bundle))
    with pytest.raises(BundleMismatch, match="has no signature that can be read"):
        load_bundle(bundle, Trust([make_keys(tmp_path / "key")]).check_of(bundle))


def test_what_is_refused_takes_no_memory(tmp_path: Path) -> None:
    code = "import sys, resource; from pathlib import Path; from policies.learned import *\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "try: load_bundle(Path(sys.argv[1]))\nexcept BundleMismatch: pass\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    command = [sys.executable, "-c", code, str(made("sparse", tmp_path / "it"))]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 100_000
