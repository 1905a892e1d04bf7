"""Which metric of which server says what: one table, from signal to metric names, and the PromQL made from it.

A metric name that does not exist is no error to Prometheus: the query answers nothing. Names therefore live in one
table with their older spellings, the rendered queries have goldens, and `jevons check` asks the live server for each.

Every candidate is looked up with ``or`` inside the aggregation, series by series, the current name first: in the
middle of a rollout some replicas speak the old name and some the new, and all of them count, each once.
This module must not know how queries are sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["sum", "mean", "max", "rate", "bucket_rate"]


@dataclass(frozen=True)
class Signal:
    """One quantity that a snapshot needs, and how the replicas' series become one number for a service.

    Attributes:
        shape: how series are combined; `rate` and `bucket_rate` are sums of rates per second.
        per_pool: whether it is kept apart by pool.
        needed: whether a service can't be scaled safely without it.
        meaning: in words, for `jevons check`.
    """

    shape: Shape
    per_pool: bool
    needed: bool
    meaning: str


SIGNALS: dict[str, Signal] = {
    "running": Signal("sum", True, True, "requests in the engines' batches"),
    "waiting": Signal("sum", True, False, "requests queued inside the engines"),
    "kv_cache_usage": Signal("mean", True, False, "share of KV blocks in use"),
    "generation": Signal("rate", False, True, "tokens generated per second"),
    "prompt": Signal("rate", False, False, "prompt tokens processed per second, cache hits included"),
    "cached": Signal("rate", False, False, "prompt tokens taken from the prefix cache per second"),
    "finished": Signal("rate", False, False, "requests finished per second"),
    "prompt_sum": Signal("rate", False, False, "prompt tokens of finished requests per second"),
    "output_sum": Signal("rate", False, False, "output tokens of finished requests per second"),
    "length_count": Signal("rate", False, False, "finished requests whose lengths were counted, per second"),
    "ttft_bucket": Signal("bucket_rate", False, False, "first tokens per second by time to first token"),
    "tpot_bucket": Signal("bucket_rate", False, False, "requests or tokens per second by time per output token"),
    "arrival": Signal("rate", False, False, "requests that reached the gateway per second"),
    "queue": Signal("sum", False, False, "requests waiting at the gateway"),
    "queue_wait": Signal("max", False, False, "mean wait at the gateway, seconds"),
    "batch_cap": Signal("max", False, False, "requests admitted per replica"),
    "replicas_target": Signal("max", True, False, "replicas asked for"),
    "replicas_ready": Signal("max", True, False, "replicas ready"),
}

Names = Mapping[str, tuple[str, ...]]


def _vllm(*names: str) -> tuple[str, ...]:
    """The spellings of a vLLM metric: its own, escaped by OpenMetrics 1.0 clients, and re-exported by Ray."""
    return tuple(f"{prefix}{name}" for name in names for prefix in ("vllm:", "vllm_", "ray_vllm_"))


def _sglang(*names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names for prefix in ("sglang:", "sglang_"))


ENGINES: dict[str, Names] = {
    # vLLM 0.33; older names after the current ones. TPOT per request first; the time between tokens is its stand-in.
    "vllm": {
        "running": _vllm("num_requests_running"),
        "waiting": _vllm("num_requests_waiting"),
        "kv_cache_usage": _vllm("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "generation": _vllm("generation_tokens_total"),
        "prompt": _vllm("prompt_tokens_total"),
        "cached": _vllm("prompt_tokens_cached_total", "prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
        "finished": _vllm("request_success_total"),
        "prompt_sum": _vllm("request_prompt_tokens_sum"),
        "output_sum": _vllm("request_generation_tokens_sum"),
        "length_count": _vllm("request_generation_tokens_count"),
        "ttft_bucket": _vllm("time_to_first_token_seconds_bucket"),
        "tpot_bucket": _vllm(
            "request_time_per_output_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
            "time_per_output_token_seconds_bucket",
        ),
    },
    # SGLang 0.5.23.
    "sglang": {
        "running": _sglang("num_running_reqs"),
        "waiting": _sglang("num_queue_reqs"),
        "kv_cache_usage": _sglang("token_usage"),
        "generation": _sglang("generation_tokens_total"),
        "prompt": _sglang("prompt_tokens_total"),
        "cached": _sglang("cached_tokens_total"),
        "finished": _sglang("num_requests_total"),
        "prompt_sum": _sglang("prompt_tokens_histogram_sum"),
        "output_sum": _sglang("generation_tokens_histogram_sum"),
        "length_count": _sglang("generation_tokens_histogram_count"),
        "ttft_bucket": _sglang("time_to_first_token_seconds_bucket"),
        "tpot_bucket": _sglang(
            "request_time_per_output_token_seconds_bucket",
            "time_per_output_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
        ),
    },
    # Text Generation Inference: no KV usage, no TTFT; lengths and tokens only when a request has finished.
    "tgi": {
        "running": ("tgi_batch_current_size",),
        "waiting": ("tgi_queue_size",),
        "generation": ("tgi_request_generated_tokens_sum",),
        "prompt": ("tgi_request_input_length_sum",),
        "finished": ("tgi_request_success_total", "tgi_request_success"),
        "prompt_sum": ("tgi_request_input_length_sum",),
        "output_sum": ("tgi_request_generated_tokens_sum",),
        "length_count": ("tgi_request_generated_tokens_count",),
        "tpot_bucket": ("tgi_request_mean_time_per_token_duration_bucket",),
    },
    # trtllm-serve, tokens and lengths when a request has finished. Behind Triton load and memory only: latency has to
    # come from the gateway.
    "tensorrt-llm": {
        "running": ("trtllm_num_requests_running", 'nv_trt_llm_request_metrics{request_type="scheduled"}'),
        "waiting": ("trtllm_num_requests_waiting", 'nv_trt_llm_request_metrics{request_type="waiting"}'),
        "kv_cache_usage": (
            "trtllm_kv_cache_utilization",
            'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',
        ),
        "generation": ("trtllm_generation_tokens_total",),
        "prompt": ("trtllm_prompt_tokens_total",),
        "finished": ("trtllm_request_success_total",),
        "prompt_sum": ("trtllm_prompt_tokens_total",),
        "output_sum": ("trtllm_generation_tokens_total",),
        "length_count": ("trtllm_request_success_total",),
        "ttft_bucket": ("trtllm_time_to_first_token_seconds_bucket",),
        "tpot_bucket": ("trtllm_time_per_output_token_seconds_bucket",),
    },
    # A Ray Serve deployment of any engine, by what Serve itself counts.
    "ray-serve": {
        "running": ("ray_serve_replica_processing_queries", "ray_serve_num_ongoing_requests_at_replicas"),
        "finished": ("ray_serve_deployment_request_counter_total", "ray_serve_deployment_request_counter"),
    },
}


@dataclass(frozen=True)
class Gateway:
    """What stands in front of the engines.

    Attributes:
        label: the label that names the service.
        names: metric names by signal.
        measures_ttft: its TTFT already includes the wait in its own queue.
    """

    label: str
    names: Names
    measures_ttft: bool = False


GATEWAYS: dict[str, Gateway] = {
    # The wait here is not in the engine's TTFT: it is taken off the objective, see `autoscaler.metrics.prometheus`.
    "haproxy": Gateway(
        label="proxy",
        names={
            # One session a request, when it comes; http_requests_total counts it when it has been answered.
            "arrival": ("haproxy_backend_sessions_total",),
            # Parts of one whole: requests without a server yet, and requests that wait for a particular one.
            "queue": ("~haproxy_(backend|server)_current_queue",),
            "queue_wait": ("haproxy_backend_queue_time_average_seconds",),
            "batch_cap": ("haproxy_server_limit_sessions",),
        },
    ),
    "llm-d-epp": Gateway(
        label="model_name",
        names={
            "arrival": (
                "llm_d_epp_request_total",
                "inference_objective_request_total",
                "inference_model_request_total",
            ),
            "queue": ("llm_d_epp_flow_control_queue_size", "inference_extension_flow_control_queue_size"),
            "ttft_bucket": ("llm_d_epp_request_ttft_seconds_bucket", "inference_objective_request_ttft_seconds_bucket"),
            "tpot_bucket": (
                "llm_d_epp_request_streaming_tpot_seconds_bucket",
                "inference_objective_request_streaming_tpot_seconds_bucket",
            ),
        },
        measures_ttft=True,
    ),
    "ray-serve": Gateway(
        label="deployment",
        names={
            "arrival": ("ray_serve_deployment_request_counter_total", "ray_serve_deployment_request_counter"),
            "queue": ("ray_serve_deployment_queued_queries",),
        },
    ),
}

REPLICA_SOURCES: dict[str, Gateway] = {
    "kube-state-metrics": Gateway(
        label="deployment",
        names={
            "replicas_target": ("kube_deployment_spec_replicas",),
            "replicas_ready": ("kube_deployment_status_replicas_ready",),
        },
    ),
}


_SPELLING = re.compile(r"^(ray_)?(vllm|sglang)[:_]")


def duration(seconds: float) -> str:
    """A PromQL duration, exact to a millisecond."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def edge_pattern(edges: Iterable[float]) -> str:
    """A regular expression for ``le`` that finds bucket edges in either spelling of whole numbers (1 and 1.0)."""
    spellings: dict[str, None] = {}
    for edge in edges:
        text = f"{edge:g}"
        spellings[text] = None
        if float(edge).is_integer():
            spellings[f"{edge:.1f}"] = None
    return "|".join([*(re.escape(text) for text in spellings), r"\+Inf"])


def selector(candidate: str, matchers: Mapping[str, str], extra: str = "") -> str:
    """One metric with label matchers.

    Args:
        candidate: its name, which may carry matchers of its own in braces; after a tilde, a regular expression.
        matchers: label values that the series must have.
        extra: one more matcher, as PromQL.
    """
    name, _, own = candidate.partition("{")
    by_name = f'__name__=~"{name[1:]}"' if name.startswith("~") else f'__name__="{name}"'
    parts = [by_name, *([own.removesuffix("}")] if own else [])]
    parts += [f'{label}="{_quoted(value)}"' for label, value in matchers.items()]
    if extra:
        parts.append(extra)
    return "{" + ",".join(parts) + "}"


def render(
    signal: str,
    candidates: Sequence[str],
    labels: Sequence[str],
    matchers: Mapping[str, str],
    window_s: float,
    edges: Iterable[float] = (),
) -> str:
    """The query for one signal of all services.

    Args:
        signal: its name in `SIGNALS`.
        candidates: metric names, the preferred one first.
        labels: what the answer is grouped by.
        matchers: label values that every series must have.
        window_s: window of rates, seconds.
        edges: for buckets, the edges to fetch; all of them when empty.
    """
    shape = SIGNALS[signal].shape
    le = f'le=~"{_quoted(edge_pattern(edges))}"' if shape == "bucket_rate" and tuple(edges) else ""
    series = [selector(candidate, matchers, le) for candidate in candidates]
    # The last sample of the window: one scrape that failed makes no replica vanish.
    function = "rate" if shape in ("rate", "bucket_rate") else "last_over_time"
    series = [f"{function}({one}[{duration(window_s)}])" for one in series]
    if shape == "bucket_rate":
        series = _apart(candidates, series)
    by = ", ".join((*labels, "le") if shape == "bucket_rate" else labels)
    combine = {"mean": "avg", "max": "max"}.get(shape, "sum")
    return f"{combine} by ({by}) ({' or '.join(series)})"


def _apart(candidates: Sequence[str], series: Sequence[str]) -> list[str]:
    """Histograms of which a target is read for one only, the first that it has.

    Bucket by bucket, `or` would fill a histogram up with another one's buckets where their edges differ.
    """
    stems: dict[str, list[str]] = {}
    for candidate, one in zip(candidates, series, strict=True):
        stems.setdefault(_SPELLING.sub("", candidate), []).append(one)
    groups = [" or ".join(group) for group in stems.values()]
    parts = [groups[0]]
    for place, group in enumerate(groups[1:], start=1):
        parts.append(f"(({group}) unless ignoring (le) ({' or '.join(groups[:place])}))")
    return parts


def render_seen(candidates: Sequence[str], labels: Sequence[str], matchers: Mapping[str, str], window_s: float) -> str:
    """How many replicas' series there are."""
    series = [f"last_over_time({selector(one, matchers)}[{duration(window_s)}])" for one in candidates]
    return f"count by ({', '.join(labels)}) ({' or '.join(series)})"


def render_sample_time(candidates: Sequence[str], labels: Sequence[str], matchers: Mapping[str, str]) -> str:
    """When the newest sample was taken, seconds since the epoch. The time of an answer is that of the question."""
    series = [f"timestamp({selector(one, matchers)})" for one in candidates]
    return f"max by ({', '.join(labels)}) ({' or '.join(series)})"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
