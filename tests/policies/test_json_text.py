"""JSON that somebody else wrote is read, or refused by one error."""

from __future__ import annotations

import pytest

from policies.json_text import read_json


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[" * 200_000, '{"a":' * 200_000, "9" * 100_000, "nul"])
def test_what_is_no_json_is_one_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(text)


@pytest.mark.parametrize("number", ["9" * 19, "-" + "9" * 19, "9" * 400, "1e999", "-1e999", "NaN", "Infinity"])
def test_a_number_that_no_array_holds_is_one_error(number: str) -> None:
    with pytest.raises(ValueError, match=r"is too large|is no number"):
        read_json(f'{{"spec": {{"replicas": {number}}}}}')


def test_whoever_checks_numbers_gets_them_all() -> None:
    assert read_json('{"trace": 340282366920938463463374607431768211455}', any_number=True) == {"trace": 2**128 - 1}


def test_the_largest_numbers_are_read() -> None:
    assert read_json(f"[{2**63 - 1}, {-(2**63)}, 1e308]") == [2**63 - 1, -(2**63), 1e308]


def test_json_is_read_from_text_and_bytes() -> None:
    assert read_json('{"a": [1, null]}') == read_json(b'{"a": [1, null]}') == {"a": [1, None]}
