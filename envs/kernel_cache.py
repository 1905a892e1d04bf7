"""Where compiled kernels are kept, and a word to the user before the one slow compilation.

Numba keys its cache by the file of each function alone, so an edit of a kernel that another one calls would go
unnoticed, and it compiles anew for a copy of the same sources at another path or of another time. The folder used here
is named after all of these.
Set ``JEVONS_CACHE_DIR`` to move it; a folder that cannot be written falls back to a temporary one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
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
_MARKER = "compiled"


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


def warm_up(say: Callable[[str], None]) -> None:
    """Compile the cluster model now if it has not been on this machine; `say` is told first.

    Args:
        say: called with one line before a compilation, not at all when there is nothing to do.
    """
    marker = FOLDER / _MARKER
    if marker.exists():
        return
    say("Compiling the cluster model for this machine (about half a minute, once) ...")
    from envs.cluster import SimulatedCluster
    from envs.traces import Trace
    from policies.contract import Target
    from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs

    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    spec = ScalingSpec(slo=Slo(ttft_s=1.0, tpot_s=0.1), pools=(PoolSpec(engine=engine, max_replicas=2),))
    trace = Trace.from_arrays(arrival_s=[0.0, 1.0], prompt_tokens=[10, 10], output_tokens=[2, 2], name="warm-up")
    cluster = SimulatedCluster.replay([spec], [trace], [0])
    cluster.wait_until(15.0)
    cluster.apply(
        Target(replicas=cluster.read().replicas_target.astype(int), batch_cap=cluster.read().batch_cap.astype(int))
    )
    marker.touch()
