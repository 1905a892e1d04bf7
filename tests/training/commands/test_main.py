import json
import subprocess
import sys

import polars as pl
import pytest
import yaml
from command_line import call, refusal

import training.judging.evaluate
from envs.cluster.warm_up import warm_up

SUITE = {
    "name": "tiny",
    "scenarios": [
        {
            "name": "chat",
            "trace": {"generator": {"profile": "chat", "duration_s": 300, "mean_rps": 5}},
            "pools": [{"engine": "llama-3.1-8b-h100", "max_replicas": 2}],
            "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
        }
    ],
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Once here, so that no command has to say that it compiles."""
    warm_up(lambda line: None)


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    return path


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,100,1\n")
    return path


def test_importing_the_commands_is_cheap():
    heavy = ("numpy", "pydantic", "polars", "pyarrow", "plotly", "numba", "torch", "mlflow", "onnxruntime", "yaml")
    code = f"import sys, training.commands.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_and_version():
    listing = call("--help").stdout
    assert all(command in listing for command in ("evaluate", "demo", "simulate", "trace"))
    assert call("--version").stdout.startswith("jevons ")


def test_evaluate_prints_a_table_and_writes_json_and_report(suite, tmp_path):
    out, page = tmp_path / "out.json", tmp_path / "report.html"
    arguments = ("--policy", "static,hpa", "--json", out, "--report", page, "--jobs", 1)
    result = call("evaluate", "--suite", suite, *arguments)
    assert result.exit_code == 0, result.output
    assert "chat: TTFT 1 s, TPOT 50 ms for 99.0%" in result.stdout
    assert "hpa" in result.stdout
    rows = json.loads(out.read_text())
    assert [(row["scenario"], row["policy"], row["seed"]) for row in rows] == [
        ("chat", "static", 0),
        ("chat", "hpa", 0),
    ]
    assert page.stat().st_size > 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "report.html", "suite.yaml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--suite", "big"), "error: no suite named 'big'; shipped suites: demo, dev, full, gate, pools, smoke"),
        (("--suite", "none.yaml"), "error: none.yaml: no such file"),
        (("--policy", "vpa"), "error: unknown policy 'vpa'"),
        (("--policy", ","), "error: no policy named"),
        (("--policy", "none.zip"), "none.zip: no such policy bundle"),
        (("--policy", "static", "--scenario", "night"), "has no scenario 'night'; it has: chat"),
        (("--policy", "static", "--tuned", "train,best"), "tuned 'best': expected default, train, self, hindsight"),
        (("--policy", "static", "--json", "no/folder/out.json"), "the folder no/folder does not exist"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_sentence(arguments, sentence, suite):
    given = arguments if "--suite" in arguments else ("--suite", suite, *arguments)
    assert sentence in refusal("evaluate", *given)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"PAR1 and no more", b"arrival_s,prompt_tokens\n1,2\n"])
def test_a_bad_trace_is_refused_before_anything_runs(content, tmp_path):
    (tmp_path / "bad").write_bytes(content)
    scenario = {**SUITE["scenarios"][0], "trace": {"file": "bad"}}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "bad", "scenarios": [SUITE["scenarios"][0], {**scenario, "name": "two"}]}))
    sentence = refusal("evaluate", "--suite", path, "--policy", "static")
    assert sentence.startswith("error: scenario 'two': ")
    assert str(tmp_path / "bad") in sentence


@pytest.mark.parametrize("arguments", [("evaluate", "--jobs", "0"), ("evaluate", "--fast"), ("simulate",), ("fly",)])
def test_bad_flags_exit_with_2(arguments):
    result = call(*arguments)
    assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_ctrl_c_is_one_line_and_130(suite, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.judging.evaluate, "evaluate", interrupted)
    result = call("evaluate", "--suite", suite, "--policy", "static")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_simulate_prints_a_summary_and_writes_every_request(log, tmp_path):
    out, requests = tmp_path / "out.json", tmp_path / "requests.parquet"
    options = ("--engine", "llama-3.1-8b-h100", "--replicas", 1, "--batch-cap", 8, "--ttft", 1, "--tpot", 0.1)
    result = call("simulate", "--trace", log, *options, "--json", out, "--requests", requests)
    assert result.exit_code == 0, result.output
    assert "ttft_p99_s" in result.stdout
    summary = json.loads(out.read_text())
    assert (summary["requests"], summary["finished"], summary["attainment"]) == (2, 2, 1.0)
    rows = pl.read_parquet(requests)
    assert rows["arrival_s"].to_list() == [0.0, 1.0]
    assert rows["tpot_s"].is_null().to_list() == [False, True]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--engine", "gpt-9"), "no engine profile named 'gpt-9'"),
        (("--engine", "none.yaml"), "none.yaml: no such file"),
        (("--batch-cap", "9999"), "batch cap: expected 1 to 256"),
        (("--replicas", "1001"), "replicas: expected 1 to 1000"),
        (("--ttft", "-1"), "--ttft: expected a number of seconds above 0"),
        (("--trace", "none.csv"), "none.csv: no such file"),
    ],
)
def test_simulate_refuses_bad_input_in_one_sentence(options, sentence, log):
    given = {"--trace": log, "--engine": "llama-3.1-8b-h100", "--replicas": "1", **dict([options])}
    assert sentence in refusal("simulate", *(word for pair in given.items() for word in pair))


def test_an_empty_trace_file_is_refused(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    options = ("--engine", "llama-3.1-8b-h100", "--replicas", 1)
    assert "is empty" in refusal("simulate", "--trace", tmp_path / "empty.csv", *options)


def test_what_if_sweeps_cold_starts_and_objectives_of_a_trace_of_ones_own(tmp_path):
    trace, out, page = tmp_path / "mine.csv", tmp_path / "out.json", tmp_path / "report.html"
    requests = "".join(f"{second},200,20\n" for second in range(200))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{requests}")
    sweep = ("--policy", "keda,static:replicas=1", "--cold-start", "60,300", "--ttft", "1,3")
    result = call(
        "what-if", "--trace", trace, *sweep, "--json", out, "--report", page, "--cache", tmp_path, "--jobs", 1
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 2 * 2
    assert rows[0]["scenario"] == "cold start 60 s, TTFT 1 s"
    assert "Cost over the sweep" in page.read_text()


def test_what_if_refuses_bad_numbers_in_one_sentence(log):
    assert "--ttft: expected numbers above 0" in refusal("what-if", "--trace", log, "--ttft", "1,fast")
    assert "--attainment: expected a share" in refusal("what-if", "--trace", log, "--attainment", "95")


def test_tune_prints_the_settings_and_writes_them(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("training.tuning.studies.TRIALS_PER_PARAMETER", 0)
    monkeypatch.setattr("training.tuning.studies.WIDENINGS", 0)
    out = tmp_path / "tuned.json"
    options = ("--policy", "static", "--cache", tmp_path / "cache", "--json", out, "--jobs", 1)
    result = call("tune", "--suite", suite, *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(out.read_text())
    assert (found["policy"], found["part"], found["trials"]) == ("static", "train", 8)
    assert (tmp_path / "cache" / "studies.db").is_file()


def test_steadiness_refuses_an_unknown_mix_and_references_alone() -> None:
    assert "mix 'poetry': expected chat, code, reasoning" in refusal("steadiness", "--mix", "poetry")
    assert "expected a policy" in refusal("steadiness", "--policy", "plan,bound")
