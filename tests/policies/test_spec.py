"""The operator's spec: one YAML, clear errors, one digest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import engine, pool, spec
from pydantic import ValidationError

from policies.engine import ColdStart, ConfigError
from policies.spec import (
    InterfaceSpec,
    PoolSpec,
    ScalingSpec,
    WindowSpec,
    find_engine,
    load_spec,
    resolve_engines,
)

SHIPPED = "llama-3.1-8b-h100"


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all scalars of nested dicts and lists."""
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in leaves(value, (*path, key))]
    if isinstance(data, list):
        return [leaf for index, value in enumerate(data) for leaf in leaves(value, (*path, index))]
    return [path]


def full() -> ScalingSpec:
    """A spec in which every optional field is set."""
    return spec(
        pool(
            name="main",
            initial_replicas=2,
            initial_batch_cap=8,
            usd_per_gpu_hour=2.0,
            cold_start=ColdStart(node_s=1.0, image_s=2.0, weights_s=3.0, warmup_s=4.0),
        ),
        guardrails={"gpu_budget": 64},
    )


def changed(value: Any) -> Any:
    """Another valid value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"on_demand": "spot", "gpu": "node"}.get(value, value + "x")
    return value + 1 if isinstance(value, int) else value * 0.9 + 0.001


LEAVES = [path for path in leaves(full().model_dump(mode="json")) if path[-1] != "feature_version"]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_digest_changes_with_every_field(path: tuple[str | int, ...]) -> None:
    data = full().model_dump(mode="json")
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = changed(place[path[-1]])
    assert ScalingSpec.model_validate(data).digest() != full().digest()


def test_digest_ignores_the_order_of_keys() -> None:
    def turned(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: turned(value) for key, value in reversed(data.items())}
        return [turned(value) for value in data] if isinstance(data, list) else data

    data = full().model_dump(mode="json")
    assert ScalingSpec.model_validate(turned(data)).digest() == full().digest()


def test_digest_does_not_tell_a_default_from_the_same_value_written_out() -> None:
    assert spec(interface={"window": {"control_interval_s": 15}}).digest() == spec().digest()


def test_interface_digest_ignores_what_a_bundle_may_ignore() -> None:
    assert spec(guardrails={"gpu_budget": 3}).interface.digest() == spec().interface.digest()
    other = InterfaceSpec(window=WindowSpec(control_interval_s=30.0))
    assert other.digest() != InterfaceSpec().digest()


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


MINIMAL: dict[str, Any] = {
    "slo": {"ttft_s": 2.0, "tpot_s": 0.05},
    "pools": [{"engine": SHIPPED, "max_replicas": 8}],
}


def test_yaml_round_trip_keeps_the_whole_spec(tmp_path: Path) -> None:
    loaded = load_spec(written(tmp_path, full().model_dump(mode="json")))
    assert loaded == full()
    assert loaded.digest() == full().digest()


def test_engine_by_name_by_path_or_inline_is_the_same_spec(tmp_path: Path) -> None:
    profile = find_engine(SHIPPED, tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "mine.yaml").write_text(yaml.safe_dump(profile.model_dump()), encoding="utf-8")
    digests = set()
    for reference in (SHIPPED, "engines/mine.yaml", str(tmp_path / "engines" / "mine.yaml"), profile.model_dump()):
        data = {**MINIMAL, "pools": [{"engine": reference, "max_replicas": 8}]}
        digests.add(load_spec(written(tmp_path, data)).digest())
    assert len(digests) == 1


def test_unknown_engine_lists_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError, match=rf"no engine profile named 'gpt-9'; shipped profiles: .*{SHIPPED}.*yaml path"
    ):
        find_engine("gpt-9", Path())


def test_missing_engine_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: no such file"):
        find_engine("mine.yaml", tmp_path)


def test_raw_pools_that_are_not_a_list_are_left_to_validation() -> None:
    assert resolve_engines("pools", Path()) == "pools"
    assert resolve_engines([3, {"engine": {}}], Path()) == [3, {"engine": {}}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": []}, "field pool: Extra inputs are not permitted"),
        ({"slo": {"ttft_s": 2.0}}, "field slo.tpot_s: Field required"),
        ({"slo": {"ttft_s": 0, "tpot_s": 1}}, "field slo.ttft_s: Input should be greater than 0, got 0"),
        ({"slo": {"ttft_s": 1, "tpot_s": 1, "attainment": 1}}, "field slo.attainment: Input should be less than 1"),
        ({"pools": []}, "field pools: Tuple should have at least 1 item"),
        ({"pools": None}, "field pools: Input should be a valid tuple"),
        ({"pools": [{"engine": SHIPPED}]}, "field pools.0.max_replicas: Field required"),
        (
            {"pools": [{"engine": SHIPPED, "min_replicas": 3, "max_replicas": 2}]},
            "field pools.0: min_replicas 3 is above max_replicas 2",
        ),
        (
            {"interface": {"window": {"control_interval_s": 5, "metrics_delay_s": 5}}},
            "field interface.window: metrics_delay_s must be below control_interval_s",
        ),
        ({"interface": {"feature_version": 2}}, "field interface.feature_version: Input should be 1, got 2"),
        ({"guardrails": {"max_scale_up_factor": 1}}, "field guardrails.max_scale_up_factor: Input should be greater"),
    ],
)
def test_error_names_file_field_and_expectation(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, {**copy.deepcopy(MINIMAL), **change})
    with pytest.raises(ConfigError) as error:
        load_spec(path)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"), [("slo: [1", "not valid YAML"), ("", "(whole file)"), ("- 1", "(whole file)")]
)
def test_file_that_is_no_spec_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_spec(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_error_counts_what_else_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        load_spec(written(tmp_path, {**MINIMAL, "a": 1, "b": 2}))


def test_folder_instead_of_a_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, expected a YAML file"):
        load_spec(tmp_path)


def test_a_slip_of_the_pen_is_named_and_not_what_is_missing_for_it(tmp_path: Path) -> None:
    data = pool().model_dump(mode="json")
    data["max_replica"] = data.pop("max_replicas")
    file = tmp_path / "chat.yaml"
    file.write_text(yaml.safe_dump({"service": "chat", "slo": {"ttft_s": 1, "tpot_s": 1}, "pools": [data]}))
    with pytest.raises(ConfigError) as caught:
        load_spec(file)
    assert (
        str(caught.value) == f"{file}: field pools.0.max_replica: Extra inputs are not permitted, got 20 (and 2 more)"
    )


def test_an_engine_that_is_not_there_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(yaml.safe_dump({"service": "chat", "pools": [{"engine": "gpt-9"}]}))
    with pytest.raises(ConfigError, match=rf"{file}: field pools.0.engine: no engine profile named 'gpt-9'"):
        load_spec(file)


def test_replica_must_fit_on_a_node() -> None:
    with pytest.raises(ValidationError, match="must fit on one node"):
        pool(engine=engine(gpus_per_replica=16))


def test_pool_falls_back_on_its_engine() -> None:
    plain = PoolSpec(engine=engine(gpus_per_replica=2), max_replicas=1)
    assert (plain.label, plain.start.total_s, plain.gpu_usd_per_hour, plain.usd_per_replica_hour) == (
        "round",
        120.0,
        3.6,
        7.2,
    )
    own = full().pools[0]
    assert (own.label, own.start.total_s, own.gpu_usd_per_hour, own.usd_per_replica_hour) == ("main", 10.0, 2.0, 2.0)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().service = "other"  # type: ignore[misc]
