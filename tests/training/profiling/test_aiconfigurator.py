import sys

import pytest

from policies.engine import ConfigError
from training.profiling.aiconfigurator import estimate

MODEL = "meta-llama/Meta-Llama-3.1-8B"


def asked(model=MODEL, system="h100_sxm", backend="vllm", version="0.24.0"):
    return estimate(model, system, backend, version, 1, None, 256, 2048)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.perf_database", None)
    with pytest.raises(ConfigError, match=r"aiconfigurator-core is not installed; get it with: pip install 'jevons\["):
        asked()


@pytest.mark.extra
def test_a_covered_pair_gives_step_times_and_capacity():
    pytest.importorskip("aiconfigurator_core", reason="the extra aiconfigurator is not installed")
    found = asked()
    assert found.backend_version == "0.24.0"
    assert found.kv_capacity_tokens == 437_216
    # One sequence decoded over 128 tokens: the weights are read once, 6.1 ms on this GPU.
    assert found.steps.design[0].tolist() == [1, 0, 1, 128, 0]
    assert found.steps.measured["step"][0] == pytest.approx(6.12e-3, rel=0.01)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"system": "none"}, r"--system: aiconfigurator does not cover 'none'; it covers .*h100_sxm"),
        ({"backend": "none"}, "--backend: expected one of vllm, sglang, trtllm, got 'none'"),
        ({"version": "0.0.1"}, r"--backend-version: .* not of '0.0.1'"),
    ],
)
def test_an_uncovered_pair_is_refused_in_a_sentence(changes, sentence):
    pytest.importorskip("aiconfigurator_core", reason="the extra aiconfigurator is not installed")
    with pytest.raises(ConfigError, match=sentence):
        asked(**changes)
