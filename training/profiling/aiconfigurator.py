"""Step times and KV capacity from aiconfigurator's tables: estimates for any pair of model and GPU that it covers.

aiconfigurator sums operator timings that were measured on silicon; the sum is an estimate of an engine iteration.
The package is optional. This module must not know about fits or files.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.engine import ConfigError
from training.profiling.measurements import StepTimes

PACKAGE = "aiconfigurator-core"
BACKENDS = ("vllm", "sglang", "trtllm")
MEMORY_FRACTION = 0.9
"""Share of the GPU memory that engines take by default: of all in vLLM and SGLang, of the free in TensorRT-LLM."""
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
PREFILLS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PREFIXES = (0, 2048, 8192)
MIXED_PREFILLS = (128, 256, 512, 1024, 2048)
MIXED_BATCHES = (1, 8, 32, 64, 128, 256)
MIXED_CONTEXTS = (512, 2048)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What aiconfigurator says of one replica.

    Attributes:
        steps: iteration times over a grid of decode, prefill and mixed iterations.
        kv_capacity_tokens: of the replica.
        backend_version: of the tables used.
        source: package and version.
    """

    steps: StepTimes
    kv_capacity_tokens: int
    backend_version: str
    source: str


def estimate(
    model: str,
    system: str,
    backend: str,
    backend_version: str | None,
    tp: int,
    precision: str | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Estimate:
    """Ask for iteration times over a grid and for the KV capacity.

    Args:
        model: name, such as ``meta-llama/Meta-Llama-3.1-8B``.
        system: GPU system, such as ``h100_sxm``.
        backend: one of `BACKENDS`.
        backend_version: of its tables; the first that the package lists (its current one) when None.
        tp: tensor parallel size.
        precision: of the matrix products, None: as the model's configuration says.
        max_num_seqs: largest batch.
        max_num_batched_tokens: token budget of an iteration.

    Raises:
        ConfigError: when the package is not installed, or it does not cover the pair.
    """
    try:
        databases = importlib.import_module("aiconfigurator_core.sdk.perf_database")
        memory = importlib.import_module("aiconfigurator_core.sdk.memory")
        forward_pass = importlib.import_module("aiconfigurator_core.sdk.rust_engine_step")
    except ImportError:
        raise ConfigError(
            f"the package {PACKAGE} is not installed; get it with: pip install 'jevons[aiconfigurator]'"
        ) from None
    if backend not in BACKENDS:
        raise ConfigError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    with _quiet():
        covered = databases.get_supported_databases()
        if system not in covered:
            raise ConfigError(
                f"--system: aiconfigurator does not cover {system!r}; it covers {', '.join(sorted(covered))}"
            )
        versions = covered[system].get(backend) or []
        if not versions:
            raise ConfigError(f"aiconfigurator has no {backend} tables for {system}")
        version = backend_version or versions[0]
        if version not in versions:
            raise ConfigError(
                f"--backend-version: aiconfigurator has {backend} tables for {system} of {', '.join(versions)}, "
                f"not of {version!r}"
            )
        config = {
            "schema_version": 1,
            "model_name": model,
            "system_name": system,
            "backend": backend,
            "backend_version": version,
            "tp_size": tp,
            "pp_size": 1,
            "attention_dp_size": 1,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
        } | ({"weight_dtype": precision} if precision else {})
        try:
            model_of_steps = forward_pass.RustForwardPassPerfModel.from_native(config)
            kv = memory.estimate_kv_cache(
                model,
                system,
                backend,
                version,
                max_num_tokens=max_num_batched_tokens,
                max_batch_size=max_num_seqs,
                memory_fraction_kind="of_free" if backend == "trtllm" else "of_total",
                memory_fraction_value=MEMORY_FRACTION,
                tp_size=tp,
                gemm_quant_mode=precision,
            )
            capacity = int(kv["total_kv_size_tokens"])
            steps = _steps(model_of_steps, capacity, max_num_seqs, max_num_batched_tokens)
        except Exception as error:  # the package raises many kinds for a pair that it cannot estimate
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"aiconfigurator cannot estimate {model} on {tp} x {system} under {backend} {version}: {reason}"
            ) from None
    return Estimate(steps, capacity, version, f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, {backend} {version}")


def _steps(model: Any, kv_capacity_tokens: int, max_num_seqs: int, max_num_batched_tokens: int) -> StepTimes:
    """Iterations that the engine can run, with their estimated times."""
    design, seconds = [], []
    for prefill, prefix, batch, context in _shapes():
        if batch > max_num_seqs or prefill > max(max_num_batched_tokens, PREFILLS[0]):
            continue
        if batch * context + prefill + prefix > kv_capacity_tokens:
            continue
        scheduled = {
            "num_prefill_requests": int(prefill > 0),
            "sum_prefill_tokens": prefill,
            "sum_prefill_kv_tokens": prefix,
            "num_decode_requests": batch,
            "sum_decode_kv_tokens": batch * context,
        }
        found_ms = model.estimate_forward_pass_time_ms([{"scheduled_requests": scheduled}])
        design.append([1.0, prefill, batch, batch * context, prefill * (prefix + prefill / 2)])
        seconds.append(found_ms * 1e-3)
    return StepTimes(np.array(design), {"step": np.array(seconds)})


def _shapes() -> Iterator[tuple[int, int, int, int]]:
    """Prefill tokens, prefix tokens, sequences decoded, context of each."""
    for batch, context in itertools.product(DECODE_BATCHES, CONTEXTS):
        yield 0, 0, batch, context
    for prefill, prefix in itertools.product(PREFILLS, PREFIXES):
        yield prefill, prefix, 0, 0
    for prefill, batch, context in itertools.product(MIXED_PREFILLS, MIXED_BATCHES, MIXED_CONTEXTS):
        yield prefill, 0, batch, context


@contextmanager
def _quiet() -> Iterator[None]:
    """The package reports every table that it falls back on; the fit's errors say what matters."""
    logger = logging.getLogger("aiconfigurator_core")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
