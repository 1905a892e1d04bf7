from __future__ import annotations

from pathlib import Path

import pytest

from training.pages.readme import BENCH_ROWS, bench_table, demo_table, replace_block

README = Path(__file__).parents[3] / "README.md"


def test_readme_has_both_blocks_and_replacing_them_touches_nothing_else() -> None:
    text = README.read_text()
    for name in ("demo", "bench"):
        changed = replace_block(text, name, "| new |")
        assert replace_block(changed, name, "| new |") == changed
        before, after = text.split(f"<!-- {name}:begin -->"), changed.split(f"<!-- {name}:begin -->")
        assert before[0] == after[0]
        assert text.split(f"<!-- {name}:end -->")[1] == changed.split(f"<!-- {name}:end -->")[1]


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="markers of block 'demo' are missing"):
        replace_block("nothing", "demo", "| |")


def test_tables_show_every_row() -> None:
    row = {
        "policy": "static",
        "attainment": 0.5,
        "holds_slo": False,
        "usd_per_mtok": 1.0,
        "usd_per_good_mtok": 2.0,
        "replica_hours": 3.0,
        "scale_events_per_hour": 4.0,
    }
    summary = {
        "by_scenario": [row],
        "scenarios": [{"name": "day", "slo": {"ttft_s": 1.0, "tpot_s": 0.05, "attainment": 0.9}}],
    }
    assert "| static | 50.00% (misses) | 1.0000 | 2.0000 | 3 | 4.0 |" in demo_table(summary)
    assert "90% of arrivals within TTFT 1 s and TPOT 50 ms" in demo_table(summary)
    assert bench_table(dict.fromkeys(BENCH_ROWS, 1.0)).count("\n") == len(BENCH_ROWS) + 3
