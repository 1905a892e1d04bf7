"""A hostile suite: faults drawn at random by seed, several at once, and what must hold after every tick.

One generator (`schedule`) draws from one list (`kinds`); two worlds play what they can of it: `virtual_world` in
process on a virtual clock, `real_world` on real servers and the wall clock. `invariants` judges both.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
for shared in (TESTS / "autoscaler", TESTS / "integration"):  # fakes and servers that other folders of tests own
    if str(shared) not in sys.path:
        sys.path.append(str(shared))
