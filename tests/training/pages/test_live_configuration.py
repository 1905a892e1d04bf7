from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from training.pages.live_configuration import keys
from training.pages.readme import replace_block

PAGE = Path(__file__).parents[3] / "docs" / "live_configuration.md"


class Part(BaseModel):
    """A part."""

    wait_s: float = Field(default=2.0, description="A wait | seconds.")


class File(BaseModel):
    """The whole.

    More.
    """

    name: str = Field(description="A name.")
    parts: dict[str, Part] = Field(default={}, description="Parts by name.")
    part: Part | None = Field(default=None, description="One part.")


def test_the_page_holds_the_keys_as_they_are_now():
    text = PAGE.read_text(encoding="utf-8")
    assert replace_block(text, "keys", keys()) == text, "run `make live-configuration`"


def test_a_part_is_a_table_of_its_own_under_all_its_places():
    assert keys(File).splitlines() == [
        "### The file",
        "",
        "The whole.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        "| `name` | needed | A name. |",
        "| `parts` |  | Parts by name. |",
        "| `part` |  | One part. |",
        "",
        "### `parts`, `part`",
        "",
        "A part.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        "| `wait_s` | `2` | A wait \\| seconds. |",
    ]


def test_a_key_without_a_description_is_named():
    class Bare(BaseModel):
        timeout_s: float = 1.0

    with pytest.raises(ValueError, match=r"Bare\.timeout_s: expected a description"):
        keys(Bare)
