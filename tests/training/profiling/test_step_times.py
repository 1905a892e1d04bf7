import csv

import pytest
import torch

from policies.engine import ConfigError
from training.profiling.measurements import Limits, StepTimes, read_measurements
from training.profiling.step_times import TINY, Iteration, Transformer, grid, main


def transformer():
    torch.manual_seed(0)
    return Transformer(TINY, 4, 64, torch.device("cpu"), torch.float32)


def test_a_prompt_in_chunks_fills_the_cache_like_a_prompt_at_once():
    """Only with equal tokens at equal places, so the chunk sizes keep them so: tokens restart in every chunk."""
    whole, chunked = transformer(), transformer()
    whole.embedding[:] = chunked.embedding[:] = whole.embedding[0]
    whole.step(Iteration(32, 0, 0, 0))
    chunked.step(Iteration(16, 0, 0, 0))
    chunked.step(Iteration(16, 16, 0, 0))
    torch.testing.assert_close(chunked.cache[..., -1, :, :32, :], whole.cache[..., -1, :, :32, :])


def test_decodes_do_not_see_the_prefill_beside_them():
    alone, mixed = transformer(), transformer()
    decoded = alone.step(Iteration(0, 0, 3, 10))
    beside = mixed.step(Iteration(8, 0, 3, 10))
    assert beside.shape == (4,)
    torch.testing.assert_close(beside[:3], decoded)
    torch.testing.assert_close(mixed.cache[:, :, :3], alone.cache[:, :, :3])


def test_the_table_is_one_that_a_profile_is_fitted_to(tmp_path):
    out = tmp_path / "steps.csv"
    main(["--tiny", "--device", "cpu", "--repeats", "2", "--out", str(out)])
    table = read_measurements(out, Limits(1, 1))
    assert isinstance(table, StepTimes)
    assert len(table) == len(list(grid(tiny=True)))
    assert table.unidentified() == []
    with out.open(newline="") as lines:
        assert {row["shape"] for row in csv.DictReader(lines)} == {"tiny"}


def test_a_missing_gpu_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no CUDA device here"):
        main(["--device", "cuda", "--out", str(tmp_path / "x.csv")])
    with pytest.raises(ConfigError, match="no such file"):
        read_measurements(tmp_path / "x.csv", Limits(1, 1))
