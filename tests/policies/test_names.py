"""Names: one alphabet, which nothing that they are sent to reads as anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from autoscaler.hosting.config import LiveConfig
from policies.engine import ConfigError, parse_model
from policies.names import Key, LabelName, Name, NameTemplate, ObjectName, OptionalName, Title
from policies.spec import PoolSpec, ScalingSpec, resolve_engines, shipped_configs

HOSTILE = (
    "",
    "a b",
    "chat;shutdown sessions",
    "chat\nset server b/s state maint",
    "chat\n",
    "@1 show info",
    'chat"} or up{x="',
    "chat\\",
    "../../pods",
    "chat/../x",
    "\x1b[2Jchat",
    "chat\u202etxt",
    "[red]chat",
    "{service.__class__}",
    "{0}",
    "-rf",
    "chat-",
    "a" * 121,
)


def accepts(kind: Any, text: str) -> bool:
    try:
        return bool(TypeAdapter(kind).validate_python(text) == text)
    except ValidationError:
        return False


@pytest.mark.parametrize("text", ["chat", "Chat_2.0", "llama-3.1-8b", "a", "7b", "kube-system", "v1", "x" * 120])
def test_names_of_the_field_are_names(text: str) -> None:
    assert all(accepts(kind, text) for kind in (Name, OptionalName, NameTemplate, Key, Title))


@pytest.mark.parametrize("text", HOSTILE)
def test_what_could_be_read_as_more_than_a_name_is_none(text: str) -> None:
    assert not any(accepts(kind, text) for kind in (Name, ObjectName, NameTemplate, LabelName))
    assert accepts(OptionalName, text) == (text == "")
    assert not accepts(Key, text)


@pytest.mark.parametrize("text", ["{service}", "{service}-jevons", "x-{pool}.{service}"])
def test_templates_fill_in_service_and_pool_alone(text: str) -> None:
    assert accepts(NameTemplate, text)
    assert accepts(Name, text.format(service="chat", pool="h100"))
    assert not accepts(Name, text)


def test_deployments_of_ray_serve_and_backends_may_hold_colons() -> None:
    assert accepts(ObjectName, "LLMServer:qwen3-8b")
    assert accepts(NameTemplate, "LLMServer:{service}")
    assert not accepts(Name, "LLMServer:qwen3-8b")
    assert not accepts(ObjectName, "chat:")


def test_keys_and_titles_have_more_letters_where_nothing_executes_them() -> None:
    assert accepts(Key, "jevons.dev/batch-cap")
    assert not accepts(Key, "a/b/c")
    assert accepts(Title, "meta-llama/Meta-Llama-3.1-8B")
    assert accepts(Title, "vllm 0.24.0")
    assert accepts(Title, "Instinct MI300X (192 GB)")
    assert not any(accepts(Title, text) for text in ("a\nb", "[red]x", "\x1b[2J", 'a"b', "a\\b", "a;b", " a"))


def test_a_live_service_has_a_name_and_a_simulated_one_a_line_of_text() -> None:
    raw = yaml.safe_load((shipped_configs() / "live" / "services" / "chat.yaml").read_text())
    raw["pools"] = resolve_engines(raw["pools"], shipped_configs())
    assert ScalingSpec(**{**raw, "service": "chat, 50 % spot"}).service == "chat, 50 % spot"
    for text in ("", "a\nb", "\x1b[2J"):
        with pytest.raises(ValidationError, match="one line of text"):
            ScalingSpec(**{**raw, "service": text})
    live = yaml.safe_load((shipped_configs() / "live" / "metric_only.yaml").read_text())
    for text in ("chat, spot", "chat;x", "a/b", 'a"b'):
        with pytest.raises(ValidationError, match=r"services\.0\.service: expected letters, digits"):
            LiveConfig(**{**live, "services": [{**raw, "service": text}]})


@given(st.text(max_size=20))
def test_every_name_is_plain_ascii_without_blanks_quotes_or_separators(text: str) -> None:
    assert not accepts(Name, text) or re.fullmatch(r"[A-Za-z0-9._-]+", text)


def test_a_wrong_name_is_one_clear_sentence() -> None:
    with pytest.raises(ConfigError) as found:
        parse_model({"name": "a;b", "engine": {}, "max_replicas": 1}, PoolSpec, "chat.yaml")
    assert str(found.value).startswith(
        "chat.yaml: field name: expected letters, digits, '-', '_' and '.', with a letter or digit at "
        "both ends, at most 120 characters, got 'a;b'"
    )
