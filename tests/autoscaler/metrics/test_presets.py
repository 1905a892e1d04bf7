"""The PromQL that is sent, word for word: a wrong metric name is answered with nothing, not with an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

from autoscaler.metrics import presets, promql
from autoscaler.metrics.client import Engine, GatewayName, PrometheusConfig
from autoscaler.metrics.queries import build_native_queries, build_queries
from policies.engine import ConfigError
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine
from tests.missing import missing_server

GOLDENS = Path(__file__).parent / "goldens"
ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
CONFIGS = {
    **{engine: {"engines": [engine], "histograms": False} for engine in presets.ENGINES},
    **{f"gateway-{gateway}": {"gateway": gateway} for gateway in presets.GATEWAYS},
    "pools-and-namespace": {
        "engines": ["vllm", "sglang"],
        "pool_label": "pool",
        "matchers": {"namespace": 'a"b'},
        "replicas": "kube-state-metrics",
        "window_s": 7.5,
    },
}


def rendered(options: dict[str, object]) -> list[str]:
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090", **options})
    native = build_native_queries(config, [SPEC])
    lines = [f"{query.signal}: {query.text}" for query in build_queries(config, [SPEC])]
    return [*lines, *(f"native {one.signal}: {one.text}" for one in native)]


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_are_those_of_the_golden_file(name: str) -> None:
    golden = GOLDENS / f"{name}.promql"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(rendered(CONFIGS[name])) + "\n", encoding="utf-8")
        pytest.fail(f"wrote {golden}: look at the difference, then run again without UPDATE_GOLDENS")
    assert rendered(CONFIGS[name]) == golden.read_text(encoding="utf-8").splitlines()


def test_promtool_accepts_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing_server("promtool is not installed: apt-get install -y --no-install-recommends prometheus")
    texts = [line.split(": ", 1)[1] for options in CONFIGS.values() for line in rendered(options)]
    rules = [{"record": f"query_{number}", "expr": text} for number, text in enumerate(texts)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    result = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_whole_number_is_found_in_both_spellings() -> None:
    assert promql.edge_pattern([1.0, 0.05]) == r"1|1\.0|0\.05|\+Inf"


def test_windows_are_exact_to_a_millisecond() -> None:
    assert [promql.duration(seconds) for seconds in (15, 7.5, 0.25)] == ["15s", "7500ms", "250ms"]


def test_every_preset_can_be_chosen_and_knows_its_signals() -> None:
    assert set(get_args(Engine)) == set(presets.ENGINES)
    assert set(get_args(GatewayName)) == {"none", *presets.GATEWAYS}
    tables = [*presets.ENGINES.values(), *(gateway.names for gateway in presets.GATEWAYS.values())]
    assert {signal for table in tables for signal in table} <= set(presets.SIGNALS)


def test_a_signal_of_ones_own_replaces_the_table() -> None:
    lines = rendered({"metrics": {"running": ["acme_running"]}})
    series = '{__name__="acme_running",service=~"chat"}'
    ranks = f"sum by (service, instance, job, prometheus_replica) (last_over_time({series}[15s]))"
    by_target, within = f"max by (service, instance) ({ranks})", ">= 0 <= 437216"
    left_out = f"{by_target} unless {by_target} {within}"
    assert lines[0] == f"running: sum by (service) ({by_target} {within}) or ({left_out})"


def test_an_unknown_signal_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no signal named 'runing'; signals: running, waiting"):
        rendered({"metrics": {"runing": ["acme_running"]}})


def test_only_the_services_own_label_values_are_asked_for() -> None:
    config = PrometheusConfig.model_validate(
        {"url": "http://localhost:9090", "names": {"chat": ["llama-3.1", 'a"b|c'], "code": "x\\y\n"}}
    )
    specs = [SPEC, SPEC.model_copy(update={"service": "code"})]
    (line,) = [query.text for query in build_queries(config, specs) if query.signal == "seen"]
    assert line.count(r'service=~"llama-3\\.1|a\"b\\|c|x\\\\y\n"') == line.count("{__name__") == 4


def test_names_that_are_too_long_for_one_query_are_refused() -> None:
    config = PrometheusConfig.model_validate({"url": "http://localhost:9090"})
    specs = [SPEC.model_copy(update={"service": f"{row:0100}"}) for row in range(600)]
    with pytest.raises(ConfigError, match="the names of 600 services are too long for one query: set shards"):
        build_queries(config, specs)
