import asyncio
import csv

import numpy as np
import pytest
from fake_engine import BLOCK_TOKENS, KV_BLOCKS, FakeEngine, running

from envs.traffic.trace import Trace
from policies.engine import ConfigError
from policies.spec import find_engine, shipped_configs
from training.profiling.fit import fit_profile
from training.profiling.load_client import Engine, EngineFailed, open_loop
from training.profiling.measure import ROW_COLUMNS, Sweep, measure
from training.profiling.measurements import Limits, read_measurements
from training.profiling.validation import replay

SWEEP = Sweep(prompt_tokens=[16, 200], output_tokens=[4, 12], concurrency=[1, 4], max_minutes=5)


def rows_of(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_sweep_measures_every_point_and_its_rows_can_be_fitted(tmp_path):
    rows, engine = tmp_path / "rows.csv", FakeEngine()
    with running(engine) as url:
        result = measure(Engine(url), SWEEP, rows)
    assert (result.model, result.done, result.points) == ("fake-model", 8, 8)
    assert result.kv_capacity_tokens == KV_BLOCKS * BLOCK_TOKENS
    assert tuple(rows_of(rows)[0]) == ROW_COLUMNS
    assert {
        (int(row["prompt_tokens"]), int(row["output_tokens"]), int(row["concurrency"])) for row in rows_of(rows)
    } == set(SWEEP.points())
    assert engine.most_at_once <= 4
    table = read_measurements(rows, Limits(result.kv_capacity_tokens, 2048))
    fit = fit_profile(table, fixed={"e_ns_per_prefill_token2": 0.0}, folds=0, bootstrap=0)
    assert fit.step.a_ms > 0


def test_a_sweep_whose_engine_dies_says_so_and_goes_on_later(tmp_path):
    rows = tmp_path / "rows.csv"
    with (
        running(FakeEngine(dies_after=40)) as url,
        pytest.raises(EngineFailed, match=r"the engine is gone .* of 8 points"),
    ):
        measure(Engine(url), SWEEP, rows)
    before = rows_of(rows)
    assert 0 < len(before) < 8
    with running(FakeEngine()) as url:
        assert measure(Engine(url), SWEEP, rows).done == 8
    assert rows_of(rows)[: len(before)] == before
    with running(FakeEngine(dies_after=1)) as url:
        assert measure(Engine(url), SWEEP, rows).done == 8


def test_a_sweep_out_of_time_keeps_what_it_has(tmp_path):
    sweep = Sweep(SWEEP.prompt_tokens, SWEEP.output_tokens, SWEEP.concurrency, max_minutes=1e-9)
    with running(FakeEngine()) as url:
        assert measure(Engine(url), sweep, tmp_path / "rows.csv").done == 0


def test_the_corners_of_a_sweep_come_first():
    points = Sweep([1, 2, 3], [7], [4, 5, 6], 1.0).points()
    assert points[:4] == [(1, 7, 4), (1, 7, 6), (3, 7, 4), (3, 7, 6)]
    assert len(set(points)) == len(points) == 9


def test_an_engine_that_ignores_lengths_is_refused(tmp_path):
    with running(FakeEngine(honours_lengths=False)) as url, pytest.raises(EngineFailed, match="must honour max_tokens"):
        measure(Engine(url), SWEEP, tmp_path / "rows.csv")


def test_text_prompts_are_sized_for_engines_without_token_ids(tmp_path):
    rows = tmp_path / "rows.csv"
    with running(FakeEngine(takes_token_ids=False, metrics=False)) as url:
        result = measure(Engine(url), SWEEP, rows)
    assert result.done == 8
    assert result.kv_capacity_tokens is None


def test_rows_of_another_table_or_model_are_not_mixed(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n1,2\n")
    with running(FakeEngine()) as url:
        with pytest.raises(ConfigError, match="is no table of a sweep"):
            measure(Engine(url), SWEEP, rows)
        rows.write_text(",".join(ROW_COLUMNS) + "\nother" + ",1" * (len(ROW_COLUMNS) - 1) + "\n")
        with pytest.raises(ConfigError, match="line 2: was measured on 'other', the engine serves 'fake-model'"):
            measure(Engine(url), SWEEP, rows)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_an_engine_that_is_not_there_is_named(tmp_path, url):
    with pytest.raises(EngineFailed, match=url):
        measure(Engine(url), SWEEP, tmp_path / "rows.csv")


def test_the_cap_bounds_an_open_loop_and_the_wait_counts():
    engine = FakeEngine()

    async def served(url):
        async with Engine(url) as client:
            return await open_loop(client, [0.0] * 6, [16] * 6, [5] * 6, batch_cap=2, seed=1)

    with running(engine) as url:
        found = asyncio.run(served(url))
    assert engine.most_at_once == 2
    assert [one.output_tokens for one in found] == [5] * 6
    assert all(one.sent_s == 0.0 for one in found)
    first = sorted(one.first_token_s for one in found)
    assert first[2] >= min(one.finish_s for one in found)


def test_a_replay_compares_live_and_simulated_distributions():
    rng = np.random.default_rng(0)
    trace = Trace.from_arrays(np.sort(rng.uniform(0, 1, 20)), rng.integers(10, 200, 20), rng.integers(2, 20, 20))
    profile = find_engine("llama-3.1-8b-h100", shipped_configs())
    with running(FakeEngine()) as url:
        comparisons = replay(Engine(url), trace, profile, [2, 8], repeats=2)
    assert [one.batch_cap for one in comparisons] == [2, 8]
    rows = comparisons[0].rows()
    assert {row["quantity"] for row in rows} == {
        *(f"{name}_p{level}_s" for name in ("ttft", "tpot", "e2e") for level in (50, 90, 99)),
        "output_tps",
    }
    for row in rows:
        assert row["error"] == pytest.approx(row["simulated"] / row["measured"] - 1)
        assert row["repeat_spread"] >= 0


def test_a_replay_that_cannot_fit_is_refused_before_any_load():
    profile = find_engine("llama-3.1-8b-h100", shipped_configs()).model_copy(update={"kv_capacity_tokens": 100})
    trace = Trace.from_arrays([0.0], [90], [11])
    with pytest.raises(ConfigError, match="a request of 101 tokens cannot fit the KV cache"):
        replay(Engine("http://127.0.0.1:1"), trace, profile, [1])
    with pytest.raises(ConfigError, match="has no request in the slice"):
        replay(Engine("http://127.0.0.1:1"), Trace.from_arrays([], [], []), profile, [1])


def event(usage):
    return b'data: {"choices": [1], "usage": ' + usage + b"}\n\n"


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (FakeEngine(listing=(404, b"")), "answered 404 to /v1/models"),
        (FakeEngine(listing=(200, b"<html>")), "/v1/models lists no model; name one with --model"),
        (FakeEngine(listing=(200, b"[1]")), "/v1/models lists no model"),
        (FakeEngine(listing=(200, b'{"data": [{}]}')), "/v1/models lists no model"),
        (FakeEngine(listing=(200, bytes(range(256)))), "/v1/models lists no model"),
        (FakeEngine(answer=(500, b"<html>\n<b>boom")), "answered 500 to a completion request: <html> <b>boom"),
        (FakeEngine(answer=(200, b"<html>")), "a stream ended without tokens"),
        (FakeEngine(answer=(200, b"data: <html>\n\n")), "streams no OpenAI completion events"),
        (FakeEngine(answer=(200, b"data: [1]\n\n")), "streams no OpenAI completion events"),
        (FakeEngine(answer=(200, b"data: \xff\n\n")), "streams no OpenAI completion events"),
        (FakeEngine(answer=(200, b"data: " + b"x" * 2_000_000)), "streams no OpenAI completion events"),
        (FakeEngine(answer=(200, event(b'{"tokens": 1}'))), "streams no OpenAI completion events"),
        (FakeEngine(answer=(200, event(b'{"prompt_tokens": null}'))), "streams no OpenAI completion events"),
        (
            FakeEngine(answer=(200, event(b'{"prompt_tokens": 0, "completion_tokens": 1}'))),
            "the usage report of a stream counts no prompt tokens",
        ),
    ],
)
def test_an_address_that_is_no_engine_is_refused_in_a_sentence(tmp_path, engine, sentence):
    with running(engine) as url, pytest.raises(EngineFailed, match=rf"^{url}: .*{sentence}"):
        measure(Engine(url), SWEEP, tmp_path / "rows.csv")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_never_answers_is_given_up(tmp_path):
    async def measured():
        silent = await asyncio.start_server(lambda reader, writer: reader.read(), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        async with silent, Engine(f"http://127.0.0.1:{port}", "a-model", request_timeout_s=0.2):
            pass

    with pytest.raises(EngineFailed, match="no answer in time"):
        asyncio.run(measured())


@pytest.fixture
def swept(tmp_path):
    """The rows of a whole sweep."""
    rows = tmp_path / "rows.csv"
    with running(FakeEngine()) as url:
        measure(Engine(url), SWEEP, rows)
    return rows


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda rows: rows[: rows.rindex(b",16,") + 6], "line 9: is damaged; remove that line"),
        (lambda rows: rows.replace(b",16,4,1,", b",16,4,x,"), "line 2: is damaged; remove that line"),
        (lambda rows: rows + rows.splitlines()[-1][:20] + rows.splitlines()[-1], "line 10: has more cells"),
        (lambda rows: bytes(range(256)), "cannot be read as CSV: is no UTF-8 text"),
    ],
)
def test_damaged_rows_are_refused_and_left_alone(swept, damage, sentence):
    swept.write_bytes(damage(swept.read_bytes()))
    before = swept.read_bytes()
    with running(FakeEngine()) as url, pytest.raises(ConfigError, match=sentence):
        measure(Engine(url), SWEEP, swept)
    assert swept.read_bytes() == before


@pytest.mark.parametrize("edit", [bytes.rstrip, lambda rows: b"\xef\xbb\xbf" + rows])
def test_rows_that_an_editor_saved_go_on(swept, edit):
    swept.write_bytes(edit(swept.read_bytes()))
    more = Sweep([16, 200], [4, 12], [1, 2, 4], max_minutes=5)
    with running(FakeEngine()) as url:
        assert measure(Engine(url), more, swept).done == 12
    assert len(read_measurements(swept, Limits(8000, 2048))) == 12


def test_an_empty_file_of_rows_is_a_new_one(tmp_path):
    (tmp_path / "rows.csv").touch()
    with running(FakeEngine()) as url:
        assert measure(Engine(url), SWEEP, tmp_path / "rows.csv").done == 8
