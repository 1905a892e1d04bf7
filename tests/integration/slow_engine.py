"""An engine so slow that a few requests per second load a fleet."""

from policies.engine import ColdStart, EngineProfile, StepModel


def slow_engine(c_us_per_seq: float, max_num_seqs: int, warmup_s: float = 0.0) -> EngineProfile:
    """Round numbers: 60 ms an iteration and `c_us_per_seq` a sequence, 50 us a prefill token."""
    return EngineProfile(
        name="slow",
        model="slow",
        gpu="none",
        backend="none",
        precision="none",
        gpus_per_replica=1,
        gpus_per_node=8,
        step=StepModel(
            a_ms=60.0,
            b_us_per_prefill_token=50.0,
            c_us_per_seq=c_us_per_seq,
            d_us_per_1k_kv_tokens=0.0,
            e_ns_per_prefill_token2=0.0,
        ),
        kv_capacity_tokens=100_000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        cold_start=ColdStart(node_s=0.0, image_s=0.0, weights_s=0.0, warmup_s=warmup_s),
        usd_per_gpu_hour=3.6,
        fitted_on="round numbers for a test",
    )
