import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from envs.traffic.commands import app
from envs.traffic.trace_files import load_trace

LOG = "when,in,out\n0,5,6\n1,x,8\n2,9,10\n"
MAP = "arrival_s=when,prompt_tokens=in,output_tokens=out"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.parquet"
    result = call("generate", "--profile", "chat", "--duration", "30m", "--rps", 2, "--seed", 3, "--out", path)
    assert result.exit_code == 0, result.output
    return path


def test_importing_the_commands_is_cheap():
    heavy = ("numpy", "polars", "pyarrow", "plotly")
    code = f"import sys, envs.traffic.commands; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_generate_writes_a_seeded_trace(trace, tmp_path):
    assert load_trace(trace).duration_s == 1_800.0
    again = tmp_path / "again.parquet"
    call("generate", "--profile", "chat", "--duration", "1800s", "--rps", 2, "--seed", 3, "--out", again)
    assert load_trace(again).digest() == load_trace(trace).digest()


def test_generate_reads_a_spec_that_options_override(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("profile: flash_crowd\nduration_s: 86400\nmean_rps: 1\ncrowd_peak: 5\n")
    result = call("generate", "--config", spec, "--duration", "1h", "--out", tmp_path / "trace.parquet")
    assert result.exit_code == 0, result.output
    assert load_trace(tmp_path / "trace.parquet").name == "flash_crowd-1rps-3600s-seed0"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--profile", "chat", "--duration", "1h"), "field mean_rps: Field required"),
        (("--profile", "video", "--duration", "1h", "--rps", "1"), "field profile: Input should be 'chat'"),
        (("--profile", "chat", "--duration", "soon", "--rps", "1"), "expected a duration such as 90s"),
        (("--config", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_generate_says_what_is_wrong_with_its_input(options, sentence, tmp_path):
    result = call("generate", *options, "--out", tmp_path / "trace.parquet")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not list(tmp_path.iterdir())


def test_info_prints_a_table_or_json(trace):
    table = call("info", trace)
    assert (table.exit_code, "index of dispersion, 60 s" in table.stdout) == (0, True)
    found = json.loads(call("info", "--json", trace).stdout)
    assert (found["duration_s"], found["dispersion"]["3600"]) == (1_800.0, None)
    assert found["digest"] == load_trace(trace).digest()


def test_import_reports_what_it_skipped(tmp_path):
    log, out = tmp_path / "log.csv", tmp_path / "trace.parquet"
    log.write_text(LOG)
    refused = call("import", log, "--map", MAP, "--out", out)
    assert (refused.exit_code, out.exists()) == (2, False)
    assert f"error: {log}: line 3: field 'in': expected a whole number of tokens, got 'x'\n" in refused.stderr
    result = call("import", log, "--map", MAP, "--skip-bad", "--out", out)
    assert (result.exit_code, len(load_trace(out))) == (0, 2)
    assert "read 3 rows as csv, skipped 1" in result.stderr
    assert "skipped: " in result.stderr


def test_info_reads_other_logs_through_a_map_in_a_unit(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("when,in,out\n" + "".join(f"{50 * row},5,6\n" for row in range(200)))
    assert call("info", log, "--map", MAP).exit_code == 2
    found = json.loads(call("info", log, "--map", MAP, "--unit", "ms", "--json").stdout)
    assert found["mean_rps"] == pytest.approx(20.1, abs=0.01)
    refused = call("info", log, "--map", MAP, "--unit", "m")
    assert (refused.exit_code, "--unit: expected one of s, ms, us, ns, got 'm'" in refused.stderr) == (2, True)


def test_an_output_that_is_the_source_is_refused(trace, tmp_path):
    link = tmp_path / "link.parquet"
    link.symlink_to(trace)
    before = trace.read_bytes()
    for words in (
        ("import", trace),
        ("slice", trace, "--start", "1m"),
        ("scale", trace, "--factor", 2),
        ("plot", trace),
    ):
        for out in (trace, link):
            refused = call(*words, "--out", out, "--force")
            assert (refused.exit_code, f"error: {out}: is the source; choose another name\n") == (2, refused.stderr)
    assert trace.read_bytes() == before


def test_import_refuses_a_malformed_map(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    result = call("import", tmp_path / "log.csv", "--map", "arrival_s", "--out", tmp_path / "trace.parquet")
    assert (result.exit_code, "expected --map field=column" in result.stderr) == (2, True)


def test_slice_and_scale_write_traces(trace, tmp_path):
    part, scaled = tmp_path / "part.parquet", tmp_path / "scaled.parquet"
    assert call("slice", trace, "--start", "10m", "--end", "25m", "-o", part).exit_code == 0
    assert load_trace(part).duration_s == 900.0
    assert call("scale", trace, "--rps", 5, "-o", scaled).exit_code == 0
    assert load_trace(scaled).mean_rps == pytest.approx(5.0, rel=0.01)
    assert call("scale", trace, "-o", tmp_path / "x").exit_code == 2
    assert call("slice", trace, "--start", "2h", "-o", tmp_path / "x").exit_code == 2


def test_plot_writes_one_page_that_needs_no_network(trace, tmp_path):
    page = tmp_path / "plot.html"
    assert call("plot", trace, "-o", page).exit_code == 0
    text = page.read_text()
    assert "Index of dispersion" in text
    assert '<script src="http' not in text
    refused = call("plot", trace, "--window", "1h", "-o", tmp_path / "x.html")
    assert (refused.exit_code, "expected at most half" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments", [("generate", "--profile", "chat", "--duration", "1m", "--rps", "1"), ("slice", "IN"), ("plot", "IN")]
)
def test_an_existing_output_is_kept_without_force(arguments, trace, tmp_path):
    out = tmp_path / "kept"
    out.write_text("precious")
    arguments = [trace if argument == "IN" else argument for argument in arguments]
    result = call(*arguments, "--out", out)
    assert (result.exit_code, out.read_text()) == (2, "precious")
    assert f"{out}: exists already; choose another name or pass --force" in result.stderr
    assert call(*arguments, "--out", out, "--force").exit_code == 0
    assert out.stat().st_size > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "trace.parquet"]


def test_a_missing_source_is_one_sentence(tmp_path):
    result = call("info", tmp_path / "none")
    assert (result.exit_code, result.stderr) == (2, f"error: {tmp_path / 'none'}: no such file\n")
