import re

import numpy as np
import pytest

from policies.spec import find_engine, shipped_configs
from training.judging.evaluate import evaluate
from training.pages.report import _thin, rolling_mean, write_report
from training.replaying.scenarios import Scenario, Suite


@pytest.fixture(scope="module")
def evaluation():
    engine = find_engine("llama-3.1-8b-h100", shipped_configs()).model_dump()
    scenarios = [
        Scenario.model_validate(
            {
                "name": name,
                "description": "Traffic & more.",
                "trace": {"generator": {"profile": profile, "duration_s": 900, "mean_rps": rps}},
                "pools": [{"engine": engine, "max_replicas": 4}],
                "slo": {"ttft_s": 0.5, "tpot_s": 0.03, "attainment": 0.99},
                "seeds": 2,
            }
        )
        for name, profile, rps in (("calm <chat>", "chat", 3), ("bursts", "code", 30))
    ]
    return evaluate(Suite(name="two", scenarios=tuple(scenarios)), ["static", "hpa:target_share=0.8"])


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(evaluation, path)
    assert [other.name for other in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_stays_small(page):
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count("plotly.js v") >= 1
    assert len(page) < 8_000_000


def test_plotly_is_inlined_once(page):
    assert len(re.findall(r"<script>/\*\*\s*\n?\* plotly\.js v", page)) == 1


def test_every_scenario_and_policy_has_a_row_and_misses_are_marked(page, evaluation):
    table = page[page.index("<table>") : page.index("</table>")]
    assert "calm &lt;chat&gt;" in table
    assert table.count("hpa:target_share=0.8") == table.count(">static<") == 2
    missed = sum(not row["holds_slo"] for row in evaluation.by_scenario())
    assert missed > 0
    assert table.count('class="miss"') == missed


def test_every_plot_asked_for_is_there(page):
    for title in (
        "Traffic, requests per second",
        "Replicas: static",
        "Replicas: hpa:target_share=0.8",
        "Waiting requests",
        "SLO met in the last minutes",
        "Dollars per hour",
        "Dollars so far",
    ):
        assert page.count(f'"text":"{title}"') == 2
    for name in ("ready", "starting", "draining", "target"):
        assert f'"name":"{name}"' in page


def test_thinning_keeps_means_and_gaps():
    values = np.array([1.0, 3.0, np.nan, np.nan, 5.0])
    assert _thin(values, 3).tolist() == pytest.approx([2.0, np.nan, 5.0], nan_ok=True)
    assert _thin(values, 9).tolist() == pytest.approx(values.tolist(), nan_ok=True)


def test_the_rolling_mean_leaves_out_what_is_unknown():
    time_s = np.arange(4) * 10.0
    values = np.array([np.nan, 1.0, np.nan, 0.0])
    assert rolling_mean(values, time_s, 20.0).tolist() == pytest.approx([np.nan, 1.0, 1.0, 0.0], nan_ok=True)
