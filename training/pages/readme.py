"""The README's tables, from a demo's summary and a benchmark's figures; blocks that commands write into pages."""

from __future__ import annotations

import re
from typing import Any

from training.pages.tables import table

BENCH_ROWS = {
    "simulator_requests_per_s_200000": ("Simulated requests per CPU-second, 8 replicas", "{:,.0f}"),
    "simulator_requests_per_s_64_replicas": ("Simulated requests per CPU-second, 64 replicas", "{:,.0f}"),
    "env_overhead_us_per_step_512": ("Environment step beside the kernel, 512 environments", "{:.1f} us"),
    "env_steps_per_s_512": ("Environment steps per CPU-second, 512 environments, about 20 requests a step", "{:,.0f}"),
    "ppo_steps_per_s_native": ("PPO.learn steps per CPU-second, native", "{:,.0f}"),
    "ppo_native_over_dummy": ("the same over DummyVecEnv", "{:.1f}x"),
    "ppo_env_share_of_time_native": ("share of that time in the environment", "{:.0%}"),
    "decision_learned_p50_ms_n1": ("Learned decision, one service, median", "{:.2f} ms"),
    "decision_learned_p50_ms_n1000": ("Learned decision, 1,000 services, median", "{:.2f} ms"),
}


def demo_table(summary: dict[str, Any]) -> str:
    """Markdown table of a demo's averages over seeds."""
    headings = ("policy", "SLO met", "$ / M tokens", "$ / M good tokens", "replica-hours", "scale events per hour")
    rows = [
        (
            row["policy"],
            f"{row['attainment']:.2%}{'' if row['holds_slo'] else ' (misses)'}",
            f"{row['usd_per_mtok']:.4f}",
            f"{row['usd_per_good_mtok']:.4f}",
            f"{row['replica_hours']:.0f}",
            f"{row['scale_events_per_hour']:.1f}",
        )
        for row in summary["by_scenario"]
    ]
    scenario = summary["scenarios"][0]
    slo = scenario["slo"]
    return (
        f"{table(headings, rows)}\n\n"
        f"*{scenario['name']}*: {slo['attainment']:.0%} of arrivals within TTFT {slo['ttft_s']:g} s and "
        f"TPOT {slo['tpot_s'] * 1000:g} ms. Written by `make docs`."
    )


def bench_table(figures: dict[str, float]) -> str:
    """Markdown table of the benchmark figures that the README shows."""
    rows = [(label, form.format(figures[name])) for name, (label, form) in BENCH_ROWS.items()]
    return f"{table(('figure', ''), rows)}\n\nOne core of a shared two-core machine; `make docs`."


def replace_block(text: str, name: str, table: str) -> str:
    """`text` with what stands between the markers of block `name` replaced.

    Raises:
        ValueError: when the markers are missing.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"markers of block {name!r} are missing")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def filled(text: str, summary: dict[str, Any], figures: dict[str, float]) -> str:
    """`text` of the README with both tables written anew.

    Args:
        text: the README.
        summary: JSON of `jevons demo`.
        figures: of the benchmarks, by name.

    Raises:
        ValueError: when a block's markers are missing.
    """
    return replace_block(replace_block(text, "demo", demo_table(summary)), "bench", bench_table(figures))
