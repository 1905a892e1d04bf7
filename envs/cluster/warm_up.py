"""A word to the user before the one slow compilation of the cluster model."""

from __future__ import annotations

from collections.abc import Callable

from envs.cluster.kernel_cache import FOLDER
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs

_MARKER = "compiled"


def warm_up(say: Callable[[str], None]) -> None:
    """Compile the cluster model now if it has not been on this machine; `say` is told first.

    Args:
        say: called with one line before a compilation, not at all when there is nothing to do.
    """
    marker = FOLDER / _MARKER
    if marker.exists():
        return
    say("Compiling the cluster model for this machine (about half a minute, once) ...")
    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    spec = ScalingSpec(slo=Slo(ttft_s=1.0, tpot_s=0.1), pools=(PoolSpec(engine=engine, max_replicas=2),))
    trace = Trace.from_arrays(arrival_s=[0.0, 1.0], prompt_tokens=[10, 10], output_tokens=[2, 2], name="warm-up")
    cluster = SimulatedCluster.replay([spec], [trace], [0])
    cluster.wait_until(15.0)
    cluster.apply(
        Target(replicas=cluster.read().replicas_target.astype(int), batch_cap=cluster.read().batch_cap.astype(int))
    )
    marker.touch()
