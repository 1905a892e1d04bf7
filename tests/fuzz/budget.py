"""How long a reader is fuzzed: a fixed set of examples in CI, or as many as fit in ``JEVONS_FUZZ_S`` seconds each."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

EXAMPLES = 400
FUZZ_S = float(os.environ.get("JEVONS_FUZZ_S", "0"))
FIRST = int(os.environ.get("JEVONS_FUZZ_SEED", "0"))


Test = Callable[..., None]


def fuzz(strategy: st.SearchStrategy[Any], examples: int = EXAMPLES) -> Callable[[Test], Test]:
    """Call a test with values of the strategy. The test fails with the seed that failed, which replays it."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def played(*fixtures: Any, **named: Any) -> None:
            until_s, number = time.monotonic() + FUZZ_S, FIRST
            while True:

                @seed(number)
                @settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    phases=(Phase.generate,),
                    suppress_health_check=list(HealthCheck),
                )
                @given(strategy)
                def once(value: Any) -> None:
                    test(*fixtures, value=value, **named)

                try:
                    once()
                except BaseException as error:
                    error.add_note(f"replay with JEVONS_FUZZ_SEED={number}")
                    raise
                number += 1
                if time.monotonic() >= until_s:
                    return

        # What is left are fixtures.
        found = inspect.signature(test)
        fixtures_only = [one for name, one in found.parameters.items() if name != "value"]
        played.__signature__ = found.replace(parameters=fixtures_only)  # type: ignore[attr-defined]
        return played

    return decorate
