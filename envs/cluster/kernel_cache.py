"""Where compiled kernels are kept; importing it points numba there, before the first kernel is defined.

Numba keys its cache by the file of each function alone, so an edit of a kernel that another one calls would go
unnoticed, and it compiles anew for a copy of the same sources at another path or with another modification time. The
name of the folder used here depends on all of these.
Set ``JEVONS_CACHE_DIR`` to move it; a folder that cannot be written falls back to a temporary one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import numba
from numba.core import config as numba_config

KERNEL_SOURCES = (
    "state.py",
    "replica_step.py",
    "engine_step.py",
    "gateway_step.py",
    "fleet_step.py",
    "window_step.py",
)


def _folder() -> Path:
    digest = hashlib.sha256(f"{numba.__version__} {platform.python_version()} {platform.machine()}".encode())
    for name in KERNEL_SOURCES:
        source = Path(__file__).resolve().with_name(name)
        digest.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    root = os.environ.get("JEVONS_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "jevons" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="jevons-kernels-"))
    return folder


FOLDER = _folder()
if not numba_config.CACHE_DIR:  # type: ignore[attr-defined]
    numba_config.CACHE_DIR = str(FOLDER)  # type: ignore[attr-defined]
