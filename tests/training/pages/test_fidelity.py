import json
import re

import pytest
import typer

from training.commands.pages import fidelity
from training.pages.fidelity import NOTES_FROM, NOTES_TO, _live, notes_of


def test_the_written_part_of_the_page_is_kept(tmp_path):
    page = tmp_path / "fidelity.md"
    assert notes_of(page) == f"{NOTES_FROM}\n{NOTES_TO}"
    page.write_text(f"table\n{NOTES_FROM}\n## Why\n{NOTES_TO}\nmore\n")
    assert notes_of(page) == f"{NOTES_FROM}\n## Why\n{NOTES_TO}"


def test_a_folder_without_measurements_is_one_sentence(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        fidelity(reference=tmp_path, page=tmp_path / "page.md")
    assert re.fullmatch(r"error: .*silicon_e2e_ttft_tpot.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_replays_of_live_engines_become_rows(tmp_path):
    row = {"batch_cap": 8, "measured": 0.02, "simulated": 0.021, "error": 0.05, "repeat_spread": None}
    rows = [
        row | {"quantity": "tpot_p50_s"},
        row | {"quantity": "ttft_p90_s", "repeat_spread": 0.4},
        row | {"quantity": "ttft_p90_s", "batch_cap": 2, "error": -0.2, "repeat_spread": 0.1},
    ]
    file = tmp_path / "replay.json"
    file.write_text(json.dumps({"profile": "mine", "trace": "t", "rows": rows}))
    text = "\n\n".join(_live([file]))
    assert "| mine | 8 | tpot_p50_s | 0.02 | 0.021 | +5.0% | - |" in text
    assert (
        "mine: median TPOT off by 5.0% to 5.0% over 1 batch caps; "
        "TTFT p90 off by 5.0% to 20.0% over 2 batch caps (live repeats differ by 10% to 40%)." in text
    )
