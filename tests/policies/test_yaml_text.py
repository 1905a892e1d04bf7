"""YAML within bounds: each text that would mean two things, or grow, is one sentence with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from policies.engine import ConfigError, read_yaml
from policies.yaml_text import MAX_DEPTH, YamlRefused, parse_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_BY_ALIASES = "- &a0 x\n" + "".join(f"- &a{k} {'[' * 30}*a{k - 1}{']' * 30}\n" for k in range(1, 60))
REFUSED = {
    "aliases that multiply": (LAUGHS, "line 6: more than 100000 values, with every alias written out"),
    "an alias of itself": ("top:\n  x: &a [1, *a]\n", "line 2: an alias of what it is part of"),
    "the same key twice": ("slo: 1\npools: 2\nslo: 3\n", "line 3: the key 'slo' is there already, in line 1"),
    "the same key deeper": ("a:\n- {b: 1, b: 2}\n", "line 2: the key 'b' is there already, in line 2"),
    "nesting": ("a: 1\nb: " + "[" * 5000 + "]" * 5000, f"line 2: nested deeper than {MAX_DEPTH} levels"),
    "nesting of blocks": ("- " * 3000 + "x", f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "nesting by aliases": (DEEP_BY_ALIASES, f"line 3: nested deeper than {MAX_DEPTH} levels, with every alias"),
    "digits": ("a: 1\nb: " + "9" * 5000, "line 2: a number of more than 40 digits"),
    "a long fraction": ("b: 1." + "9" * 5000, "line 1: a number of more than 40 digits"),
    "a date that is none": ("a: 2024-13-45\n", "line 1: '2024-13-45' is no value: month must be in 1..12"),
    "an object of Python": ("a: !!python/object/apply:os.system [x]\n", "line 1: not valid YAML: could not determine"),
    "a list as a key": ("[a, b]: 1\n", "line 1: not valid YAML: found unhashable key"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: but found another document"),
    "size": ("# " + "x" * 2**20, "larger than 1048576 bytes"),
    "a byte of another encoding": ("a: \x00", "not valid YAML: unacceptable character #x0000"),
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_text_out_of_bounds_is_one_sentence_with_file_and_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as found:
        read_yaml(path)
    assert str(found.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(found.value)


def test_anchors_merges_and_numbers_of_an_ordinary_file_are_read() -> None:
    text = "base: &b {x: 1, y: 2.5}\nsame: *b\nmore: {<<: *b, y: 3}\nday: 2024-01-31\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    # What is merged from a mapping that is itself merged, and whose turn comes later, names no key twice.
    nested = "root: &r {x: 0}\ninner:\n  base: &b {<<: *r, x: 1}\nmore: {<<: *b, y: 2}\n"
    assert parse_yaml(nested) == {"root": {"x": 0}, "inner": {"base": {"x": 1}}, "more": {"x": 1, "y": 2}}
    assert parse_yaml("") is None


def test_a_device_without_an_end_is_read_no_further_than_a_configuration_goes() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(Path("/dev/zero"))


@given(st.text(alphabet="ab12:-[]{}&*!|>?,#'\"%@`~<.\n \t", max_size=60))
def test_any_text_is_the_librarys_value_or_is_refused(text: str) -> None:
    try:
        value = parse_yaml(text)
    except YamlRefused:
        return
    again = yaml.safe_load(text)
    assert value == again or repr(value) == repr(again)  # not-a-number is not itself
