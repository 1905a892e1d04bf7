"""The engine profiles that ship: each loads, and what is wrong in one is said by file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from policies.engine import ConfigError, load_engine

ENGINES = Path(__file__).parents[2] / "configs" / "engines"
FILES = sorted(ENGINES.glob("*.yaml"))
SHIPPED = {
    "llama-3.1-8b-h100",
    "llama-3.1-8b-h200",
    "llama-3.1-8b-a100",
    "llama-3.1-8b-l40s",
    "llama-3.1-8b-b200",
    "llama-3.1-70b-h100-tp4",
    "llama-3.1-70b-h100-tp4-fp8",
    "llama-3.1-70b-h200-tp4",
    "llama-3.1-70b-a100-tp4",
    "llama-3.1-70b-b200-tp4",
    "qwen3-32b-h100-tp2",
    "qwen3-32b-h200-tp2",
    "qwen3-32b-a100-tp2",
    "qwen3-32b-b200-tp2",
}


def test_the_documented_profiles_ship() -> None:
    assert {path.stem for path in FILES} >= SHIPPED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_profile_loads_under_its_file_name(path: Path) -> None:
    profile = load_engine(path)
    assert profile.name == path.stem
    assert profile.gpus_per_node % profile.gpus_per_replica == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_profile_states_licence_and_origin(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert "not measured silicon" in load_engine(path).fitted_on


def test_newer_gpus_decode_faster() -> None:
    fixed = [load_engine(ENGINES / f"llama-3.1-8b-{gpu}.yaml").step.a_ms for gpu in ("b200", "h200", "h100", "a100")]
    assert fixed == sorted(fixed)


def test_larger_models_load_longer() -> None:
    names = ("llama-3.1-8b-h100", "qwen3-32b-h100-tp2", "llama-3.1-70b-h100-tp4")
    loads = [load_engine(ENGINES / f"{name}.yaml").cold_start for name in names]
    assert [load.weights_s for load in loads] == sorted({load.weights_s for load in loads})
    assert [load.total_s for load in loads] == sorted({load.total_s for load in loads})


def _altered(tmp_path: Path, change: dict[str, Any], section: str | None = None) -> Path:
    """Write a copy of a profile with some keys changed, in one section or at the top."""
    data = yaml.safe_load((ENGINES / "llama-3.1-8b-h100.yaml").read_text(encoding="utf-8"))
    (data if section is None else data[section]).update(change)
    path = tmp_path / "altered.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "section", "field"),
    [
        ({"kv_capacity_token": 1000}, None, "kv_capacity_token"),
        ({"a_milliseconds": 6.0}, "step", "step.a_milliseconds"),
        ({"b_us_per_prefill_token": -1.0}, "step", "step.b_us_per_prefill_token"),
        ({"a_ms": 0.0}, "step", "step.a_ms"),
        ({"c_us_per_seq": float("inf")}, "step", "step.c_us_per_seq"),
        ({"weights_s": "long"}, "cold_start", "cold_start.weights_s"),
        ({"gpus_per_replica": 0}, None, "gpus_per_replica"),
        ({"usd_per_gpu_hour": 0.0}, None, "usd_per_gpu_hour"),
    ],
)
def test_wrong_field_is_named_with_its_file(
    tmp_path: Path, change: dict[str, Any], section: str | None, field: str
) -> None:
    path = _altered(tmp_path, change, section)
    with pytest.raises(ConfigError) as caught:
        load_engine(path)
    assert str(caught.value).startswith(f"{path}: field {field}: ")


def test_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    text = (ENGINES / "llama-3.1-8b-h100.yaml").read_text(encoding="utf-8")
    path.write_text("\n".join(line for line in text.splitlines() if "a_ms" not in line), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"short\.yaml: field step\.a_ms: Field required"):
        load_engine(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_engine(path)


@pytest.mark.parametrize("text", ["", "just text", "- a\n- list"])
def test_file_that_is_not_a_profile_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other\.yaml: field \(whole file\)"):
        load_engine(path)


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml: line 1: not valid YAML"):
        load_engine(path)
