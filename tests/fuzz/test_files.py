"""Every file that Jevons reads gives a value or one of Jevons's own errors, whatever is in it."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from budget import fuzz
from mutations import mutated_bytes, mutated_json, mutated_text

from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.config import load_live_config
from autoscaler.hosting.serve_policy import policy
from autoscaler.records.database import pack, unpack, unpack_names
from autoscaler.versions.registry import kept_bundle
from envs.traffic.formats import import_trace
from envs.traffic.summary import summarize
from envs.traffic.trace import TraceError
from envs.traffic.trace_files import TraceLimits
from policies.engine import ConfigError, load_engine
from policies.fleet import Fleet
from policies.learned import BundleMismatch, LearnedPolicy, _digest, _pack, load_bundle
from policies.lineup import SHIPPED_BUNDLE
from policies.spec import InterfaceSpec, find_engine, load_spec, shipped_configs
from training.replaying.scenarios import load_suite

LIVE = shipped_configs() / "live"
LIMITS = TraceLimits(rows=100_000, size=2**24)
MAP = {"arrival_s": "time", "prompt_tokens": "in", "output_tokens": "out", "session_id": "s", "tenant": "who"}


@functools.cache
def texts(*patterns: str) -> tuple[str, ...]:
    return tuple(path.read_text() for pattern in patterns for path in sorted(shipped_configs().glob(pattern)))


def written(folder: Path, data: bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(data)
    return path


YAML = mutated_bytes(*(text.encode() for text in texts("live/*.yaml", "live/services/*.yaml", "engines/*l40s*.yaml")))


@fuzz(YAML)
def test_yaml(tmp_path: Path, value: bytes) -> None:
    path = written(tmp_path, value)
    for load in (load_spec, load_live_config, load_engine, lambda path: load_suite(str(path))):
        try:
            load(path)
        except ConfigError as refused:
            assert "\n" not in str(refused)  # noqa: PT017 - either way is right


def spec_data() -> Any:
    engine = find_engine("llama-3.1-8b-l40s", shipped_configs()).model_dump(mode="json")
    pool = {"name": "a", "engine": engine, "max_replicas": 4, "spot": {"notice_s": 3}, "cold_start_cv": 0.1}
    return {"service": "chat", "slo": {"ttft_s": 1.0, "tpot_s": 0.1}, "pools": [pool, {**pool, "name": "b"}]}


def live_data() -> Any:
    actuator = {
        "kind": "composite",
        "replicas": {"kind": "kubernetes", "target": {"name": "{service}"}},
        "batch_cap": {"kind": "haproxy", "sockets": ["/x"], "route": ["*"], "server_options": "check"},
    }
    return {
        "name": "jevons",
        "services": [spec_data()],
        "metrics": {"url": "http://a:b@h", "auth": {"username": "x", "password_env": "X"}, "names": {"chat": "c"}},
        "actuator": actuator,
        "policy": {"reference": "learned", "tracking_uri": "http://x:y@z"},
        "records": {"url": "sqlite:///x.db"},
        "ray": {"address": "ray://h:1"},
    }


@fuzz(mutated_json(live_data(), spec_data()))
def test_values_of_configurations(tmp_path: Path, value: Any) -> None:
    path = written(tmp_path, json.dumps(value).encode())  # JSON is YAML
    for load in (load_live_config, load_spec):
        try:
            loaded = load(path)
        except ConfigError as refused:
            assert "\n" not in str(refused)  # noqa: PT017 - either way is right
            continue
        if load is load_live_config:
            with contextlib.suppress(ConfigError):
                assert loaded.located(tmp_path).database_url


@fuzz(mutated_bytes(SHIPPED_BUNDLE.read_bytes()))
def test_bytes_of_bundles(tmp_path: Path, value: bytes) -> None:
    path = written(tmp_path, value)
    try:
        load_bundle(path)
    except BundleMismatch as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either way is right


@functools.cache
def shipped() -> tuple[Any, bytes]:
    bundle = load_bundle(SHIPPED_BUNDLE)
    return bundle.manifest.model_dump(mode="json"), bundle.weights


@fuzz(mutated_json(shipped()[0]))
def test_manifests_with_a_digest_that_fits(tmp_path: Path, value: Any) -> None:
    weights = shipped()[1]
    data = value if isinstance(value, dict) else {}
    text = json.dumps({**data, "digest": _digest(data, weights)}, indent=1, sort_keys=True)
    path = written(tmp_path, _pack(text.encode(), weights))
    try:
        load_bundle(path)
    except BundleMismatch as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either way is right


@fuzz(mutated_bytes(shipped()[1]))
def test_networks_with_a_digest_that_fits(tmp_path: Path, value: bytes) -> None:
    data = shipped()[0]
    text = json.dumps({**data, "digest": _digest(data, value)}, indent=1, sort_keys=True)
    try:
        loaded = load_bundle(written(tmp_path, _pack(text.encode(), value)))
        LearnedPolicy(loaded, Fleet.empty(2, 1), InterfaceSpec())
    except BundleMismatch as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either way is right


CSV = "time,in,out,s,who\n" + "".join(f"{place / 7},{place + 3},{place + 1},s{place % 2},t\n" for place in range(6))
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9,396,109\n"
BURST = "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,a,GPT,472,18,490,Conv\n"
JSONL = "".join(
    json.dumps({"timestamp": at * 3000, "input_length": 900, "output_length": 5, "hash_ids": [0, at]}) + "\n"
    for at in range(4)
)


def read_trace(path: Path, column_map: dict[str, str] | None = None, skip_bad: bool = False) -> None:
    try:
        trace = import_trace(path, column_map, skip_bad=skip_bad, limits=LIMITS).trace
    except TraceError as refused:
        assert "\n" not in str(refused)  # noqa: PT017 - either way is right
        return
    summarize(trace)
    assert len(trace.digest()) == 64


@fuzz(mutated_text(CSV, AZURE, BURST, JSONL))
def test_text_logs(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, value.encode(errors="replace"))
    for skip_bad in (False, True):
        read_trace(path, None, skip_bad)
        read_trace(path, MAP, skip_bad)


@fuzz(mutated_json(*(json.loads(line) for line in JSONL.splitlines())))
def test_json_logs(tmp_path: Path, value: Any) -> None:
    first = JSONL.splitlines()[0]
    path = written(tmp_path, f"{first}\n{json.dumps(value)}\n{first}\n".encode())
    read_trace(path)
    read_trace(path, skip_bad=True)


@fuzz(mutated_bytes(gzip.compress(CSV.encode(), mtime=0), gzip.compress(JSONL.encode(), mtime=0)))
def test_archives(tmp_path: Path, value: bytes) -> None:
    read_trace(written(tmp_path, value), MAP)


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


PARQUET = parquet(
    arrival_s=np.arange(5) / 3, prompt_tokens=[5] * 5, output_tokens=[3] * 5, tenant=["a", None, "b", "a", "a"]
)


@fuzz(mutated_bytes(PARQUET))
def test_bytes_of_parquet(tmp_path: Path, value: bytes) -> None:
    read_trace(written(tmp_path, value))


COLUMNS: dict[str, list[Any]] = {
    "arrival_s": [0.0, 1.0, 2.5],
    "prompt_tokens": [5, 6, 7],
    "output_tokens": [1, 2, 3],
    "session_id": [0, 0, 1],
    "prefix_hit_tokens": [0, 1, 2],
    "tenant": ["a", "b", None],
    "model": ["m", "m", "m"],
}


@fuzz(mutated_json(COLUMNS))
def test_columns_of_parquet(tmp_path: Path, value: Any) -> None:
    try:
        data = parquet(**value)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
        return  # Arrow cannot write it
    read_trace(written(tmp_path, data))


@fuzz(mutated_bytes(pack({"a": np.arange(5), "b/c": np.array(["x", "yz"])})))
def test_stored_arrays(value: bytes) -> None:
    for read in (unpack, unpack_names):
        try:
            read(value)
        except RecordsUnavailable as refused:
            assert "\n" not in str(refused)  # noqa: PT017 - either way is right


class Context:
    deployment_name, app_name, target_num_replicas = "chat", "app", 3
    capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 1, 8


@fuzz(mutated_json({"chat": {"pool": {"replicas": 2, "batch_cap": 8, "time_s": 0.0}}, "app": {}}))
def test_published_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setenv("JEVONS_TARGETS_FILE", str(written(tmp_path, json.dumps(value).encode())))
    assert 1 <= policy(Context())[0] <= 8


@fuzz(mutated_text("m/3\nm-3-abc.zip\n"))
def test_pointers_to_kept_bundles(tmp_path: Path, value: str) -> None:
    (tmp_path / "m-champion.last").write_text(value, encoding="utf-8", errors="replace")
    kept = kept_bundle("models:/m@champion", tmp_path)
    assert kept is None or kept[1].parent == tmp_path
