"""The emulated engine over HTTP: OpenAI's stream, vLLM's metrics, the pace of the step-time model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from servers import Engine, wait_until

from policies.spec import find_engine

PROFILE = find_engine("llama-3.1-8b-h100", Path())


@pytest.fixture(scope="module")
def cap_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("engine") / "cap"
    file.write_text("4")
    return file


@pytest.fixture(scope="module")
def engine(cap_file: Path) -> Iterator[Engine]:
    server = Engine(cap_file.parent, "--batch-cap-file", str(cap_file), "--model", "tiny").ready()
    yield server
    server.stop()


def ask(
    engine: Engine, output: int, prompt: int = 10, stream: bool = False, path: str = "/v1/completions"
) -> requests.Response:
    body = {"model": "tiny", "prompt": "x", "jevons_prompt_tokens": prompt, "max_tokens": output, "stream": stream}
    return requests.post(f"http://{engine.address}{path}", json=body, timeout=60, stream=stream)


def value(engine: Engine, name: str) -> float:
    text = requests.get(f"http://{engine.address}/metrics", timeout=5).text
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line)
    )


def test_streams_one_event_per_token_then_done(engine: Engine) -> None:
    events = [line.removeprefix("data: ") for line in ask(engine, 5, stream=True).text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert [choice["text"] for choice in choices] == [" token"] * 5
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]


def test_chat_answers_whole_with_usage(engine: Engine) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4}
    answer = requests.post(f"http://{engine.address}/v1/chat/completions", json=body, timeout=30).json()
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert answer["choices"][0]["message"]["content"] == " token" * 4


def test_a_request_that_cannot_fit_is_refused(engine: Engine) -> None:
    answer = ask(engine, 1, prompt=PROFILE.kv_capacity_tokens)
    assert answer.status_code == 400
    assert "KV capacity" in answer.json()["error"]["message"]


def test_counts_what_it_did_under_vllm_names(engine: Engine) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_count",
        "request_time_per_output_token_seconds_count",
        "inter_token_latency_seconds_count",
    )
    before = {name: value(engine, f"vllm:{name}") for name in names}
    for _ in range(3):
        assert ask(engine, 7, prompt=20).status_code == 200
    assert {name: value(engine, f"vllm:{name}") - before[name] for name in names} == {
        "prompt_tokens_total": 60.0,
        "generation_tokens_total": 21.0,
        "request_success_total": 3.0,
        "time_to_first_token_seconds_count": 3.0,
        "request_time_per_output_token_seconds_count": 3.0,
        "inter_token_latency_seconds_count": 18.0,
    }
    assert value(engine, "vllm:num_requests_running") == 0
    assert value(engine, "vllm:kv_cache_usage_perc") == 0


def test_never_runs_faster_than_its_step_times(engine: Engine) -> None:
    started = time.monotonic()
    assert ask(engine, 100, prompt=100).status_code == 200
    a, b, *_ = PROFILE.step.seconds
    assert time.monotonic() - started >= 100 * a + 100 * b


def test_batch_cap_follows_its_file_while_running(engine: Engine, cap_file: Path) -> None:
    wait_until(lambda: engine_cap_holds(engine, 4), "cap of 4")
    cap_file.write_text("2")
    time.sleep(1.5)
    assert engine_cap_holds(engine, 2)


def engine_cap_holds(engine: Engine, cap: int) -> bool:
    """Eight requests at once: as many run as the cap allows, the others wait."""
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, engine, 150) for _ in range(8)]
        time.sleep(0.4)
        running, waiting = value(engine, "vllm:num_requests_running"), value(engine, "vllm:num_requests_waiting")
        assert [answer.result().status_code for answer in answers] == [200] * 8
    return (running, waiting) == (cap, 8 - cap)


def test_a_client_that_leaves_frees_its_place(engine: Engine) -> None:
    response = ask(engine, 5000, stream=True)
    lines = response.iter_lines()  # kept: a collected iterator closes the connection
    assert next(lines).startswith(b"data: ")
    assert value(engine, "vllm:num_requests_running") == 1
    response.close()
    wait_until(lambda: value(engine, "vllm:num_requests_running") == 0, "the place is free")
    assert value(engine, "vllm:kv_cache_usage_perc") == 0
