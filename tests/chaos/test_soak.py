"""The regression line, and three minutes of the soak itself."""

from pathlib import Path

import numpy as np
import pytest
from servers import start

from tests.chaos.soak import drawn, line, report, soak

HOURS_S = np.arange(0.0, 7200.0, 5.0)
NOISE = np.random.default_rng(0).normal(0.0, 0.5, len(HOURS_S))


def test_what_grows_is_told_from_noise() -> None:
    assert line(HOURS_S, 100.0 + NOISE).verdict == "flat"
    grown = line(HOURS_S, 100.0 + 2.0 * HOURS_S / 3600.0 + NOISE)
    assert grown.verdict == "grows"
    assert grown.low < 2.0 < grown.high
    assert line(HOURS_S, np.full(len(HOURS_S), 12.0)).verdict == "flat"


def test_a_wave_is_not_taken_for_growth_and_too_few_samples_say_nothing() -> None:
    assert line(HOURS_S, 100.0 + 5.0 * np.sin(HOURS_S / 300.0)).verdict == "unsure"
    assert line(HOURS_S[:3], [1.0, 2.0, 3.0]).verdict == "unsure"
    minutes_s = HOURS_S[:36]
    assert line(minutes_s, 100.0 + minutes_s).verdict == "unsure"


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_minutes_on_real_servers(tmp_path: Path) -> None:
    found = start(soak, tmp_path, 3.0, 20)
    print(report(found))
    assert found["haproxy_alive"]
    assert found["lost"] == 0
    assert found["grows"] == []
    assert drawn(found).startswith("<svg")
