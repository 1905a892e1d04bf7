import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from fake_engine import FakeEngine, running
from typer.testing import CliRunner

from envs.traffic.trace import Trace
from envs.traffic.trace_files import write_trace
from policies.engine import load_engine
from training.commands.main import app
from training.profiling.measure import SweepResult
from training.profiling.measurements import COEFFICIENTS

BASE = ("--base", "llama-3.1-8b-h100")
MEASURE = ("measure", "--url", "http://127.0.0.1:1", *BASE)


def call(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def steps(tmp_path):
    """A table that follows a = 5 ms, b = 20 us, c = 10 us, d = 40 us per 1,000, e = 1 ns exactly."""
    path = tmp_path / "steps.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("prefill_tokens", "decode_requests", "context_tokens", "step_ms"))
        for p, batch, context in [(p, b, c) for p in (0, 100, 1000, 4000) for b in (0, 8, 64) for c in (100, 4000)]:
            writer.writerow(
                (p, batch, context, 5 + 0.02 * p + 0.01 * batch + 4e-5 * batch * context + 1e-6 * p * p / 2)
            )
    return path


def test_importing_the_commands_is_cheap():
    heavy = ("numpy", "scipy", "aiohttp")
    code = f"import sys, training.commands.profile; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_fit_writes_a_profile_a_report_and_figures(steps, tmp_path):
    out, report, figures = tmp_path / "mine.yaml", tmp_path / "fit.html", tmp_path / "fit.json"
    result = call("fit", steps, *BASE, "--out", out, "--report", report, "--json", figures, "--bootstrap", 5)
    assert result.exit_code == 0, result.output
    profile = load_engine(out)
    assert profile.name == "mine"
    assert profile.gpu == "H100-SXM"
    found = [getattr(profile.step, name) for name in COEFFICIENTS]
    np.testing.assert_allclose(found, [5, 20, 10, 40, 1], rtol=0.01)
    assert "steps.csv" in profile.fitted_on
    assert "held out" in result.output
    assert "predicted step time" in report.read_text()
    errors = json.loads(figures.read_text())["errors"]
    assert [row["label"] for row in errors] == ["in sample", "held out (5 folds)"]
    assert errors[1]["mean"] < 0.01


def test_validate_shows_how_far_a_profile_is_off(steps, tmp_path):
    figures = tmp_path / "errors.json"
    result = call("validate", "llama-3.1-8b-h100", "--data", steps, "--json", figures)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(figures.read_text())["errors"]
    assert row["rows"] == 24
    assert 0.0 < row["median"] < 0.5


def test_measure_and_replay_run_against_an_engine(tmp_path):
    out, trace, figures = tmp_path / "fake.yaml", tmp_path / "trace.parquet", tmp_path / "replay.json"
    write_trace(Trace.from_arrays([0.0, 0.1, 0.2, 30.0], [20, 40, 80, 20], [5, 9, 3, 4]), trace)
    with running(FakeEngine()) as url:
        measured = call(
            *("measure", "--url", url, *BASE, "--out", out, "--prompt", "16,200", "--output", "4,12"),
            *("--concurrency", "1,4", "--fix", "e_ns_per_prefill_token2=0", "--folds", 0, "--bootstrap", 0),
        )
        assert measured.exit_code == 0, measured.output
        options = ("--batch-cap", 2, "--batch-cap", 4, "--seconds", 10, "--json", figures)
        replayed = call("validate", out, "--replay", trace, "--url", url, *options)
    assert replayed.exit_code == 0, replayed.output
    assert "3 requests of trace.parquet" in replayed.output
    assert load_engine(out).kv_capacity_tokens == 8000
    found = json.loads(figures.read_text())
    assert (found["profile"], found["trace"]) == ("fake", "trace.parquet")
    assert {row["batch_cap"] for row in found["rows"]} == {2, 4}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fit", "none.csv", *BASE, "--out", "x.yaml"), "error: none.csv: no such file"),
        (("fit", "none.csv", "--base", "none", "--out", "x.yaml"), "error: no engine profile named 'none'"),
        (("fit", "none.csv", *BASE, "--out", "no/x.yaml"), "error: no/x.yaml: the folder no does not exist"),
        (
            ("fit", "none.csv", *BASE, "--out", "x.yaml", "--where", "tp"),
            "error: --where: expected NAME=VALUE, got 'tp'",
        ),
        (("validate", "llama-3.1-8b-h100"), "error: expected --data, or --replay with --url"),
        (
            ("measure", "--url", "http://127.0.0.1:1", *BASE, "--out", "x.yaml", "--prompt", "a"),
            "error: --prompt: expected",
        ),
        (
            ("measure", "--url", "http://127.0.0.1:1", *BASE, "--out", "x.yaml"),
            "error: http://127.0.0.1:1: the engine is",
        ),
        (
            (*MEASURE, "--out", "x.yaml", "--prompt", "64"),
            "error: the sweep cannot identify d_us_per_1k_kv_tokens, e_ns",
        ),
        ((*MEASURE, "--out", "x.yaml", "--output", "1"), "error: --output: expected numbers from 2 to 1,000,000"),
        (
            (*MEASURE, "--out", "x.yaml", "--concurrency", "1,5000"),
            "error: --concurrency: expected numbers from 1 to 4,",
        ),
        ((*MEASURE, "--out", "x.yaml", "--rows", "x.yaml"), "error: x.yaml: is named twice"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a=1"), "error: --fix: no coefficient 'a'; coefficients: a_ms, b_us"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a_ms"), "error: --fix: expected NAME=VALUE, got 'a_ms'"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a_ms=x"), "error: --fix: a_ms: expected a number, got 'x'"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a_ms=0"), "error: --fix: a_ms: expected a number above 0"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a_ms=nan"), "error: --fix: a_ms: expected a number above 0"),
        ((*MEASURE, "--out", "x.yaml", "--fix", "a_ms=1", "--fix", "a_ms=2"), "error: --fix: a_ms is given twice"),
        ((*MEASURE, "--out", "x.csv"), "error: x.csv: expected a name that ends in .yaml"),
        ((*MEASURE, "--out", "/proc/x.yaml"), "error: /proc/x.yaml: cannot be written: "),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert list(tmp_path.iterdir()) == []


def test_too_few_rows_are_one_sentence(steps, tmp_path):
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:4]))
    result = call("fit", steps, *BASE, "--out", tmp_path / "x.yaml")
    assert result.exit_code == 2
    assert "error: 3 rows are too few to fit 5 coefficients" in result.output
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--folds", 1), "error: one fold leaves no row to fit: use two or more, or --folds 0"),
        (("--folds", 25), "error: 24 rows are too few for 25 folds: use fewer, or --folds 0"),
        ([f"--fix={name}=1" for name in COEFFICIENTS], "error: every coefficient is given: nothing is left to fit"),
    ],
)
def test_a_fit_that_makes_no_sense_is_one_sentence(steps, tmp_path, options, sentence):
    result = call("fit", steps, *BASE, "--out", tmp_path / "x.yaml", *options)
    assert result.exit_code == 2
    assert sentence in result.output
    assert not (tmp_path / "x.yaml").exists()


def test_results_never_overwrite_the_data(steps, tmp_path):
    before = steps.read_text()
    for command in (
        ("fit", steps, *BASE, "--out", tmp_path / "x.yaml", "--json", tmp_path / "." / "steps.csv"),
        ("validate", "llama-3.1-8b-h100", "--data", steps, "--report", steps),
    ):
        result = call(*command)
        assert result.exit_code == 2
        assert "steps.csv: is named twice, and would overwrite" in result.output
    assert steps.read_text() == before


def test_a_sweep_without_a_single_point_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("training.profiling.measure.measure", lambda *_: SweepResult("fake-model", 0, 8, None))
    result = call(*MEASURE, "--out", tmp_path / "x.yaml", "--max-minutes", 1)
    assert result.exit_code == 2
    assert "error: no point was measured within 1 minutes; give it more with --max-minutes" in result.output
