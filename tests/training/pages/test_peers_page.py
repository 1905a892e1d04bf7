"""The page about the peers says what the code says."""

from __future__ import annotations

from pathlib import Path

from policies.lineup import BASELINES
from training.pages.peers import page
from training.pages.readme import replace_block

PAGE = Path(__file__).parents[3] / "docs" / "peers.md"


def test_the_page_is_what_make_peers_would_write():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_block(text, "peers", page()) == text


def test_the_page_names_every_policy_and_parameter():
    text = page()
    for name, policy in BASELINES.items():
        assert f"**`{name}`**" in text
        for item in policy.PARAMETERS:
            assert f"| `{item.name}` | " in text
