"""``python -m tests.chaos``: play random faults and print what did not hold; non-zero where something did not."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.schedule import Schedule, shrunk
from tests.chaos.virtual_world import VirtualWorld


def play(planned: Schedule) -> list[str]:
    """The violations of one run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return VirtualWorld(planned, Path(folder)).run()


def summary(found: Sequence[str]) -> list[str]:
    """One line per kind of violation: how often, and the first."""
    kinds: dict[str, list[str]] = {}
    for line in found:
        kinds.setdefault(re.sub(r"\[.*|\d+(\.\d+)?|chat|code|neighbour", "*", line), []).append(line)
    return [f"{len(lines):5d} x {lines[0]}" for lines in kinds.values()]


def play_real(planned: Schedule) -> list[str]:
    """The same on real servers."""
    from kube_server import KubeApiServer

    from tests.chaos.real_world import RealWorld

    with tempfile.TemporaryDirectory() as folder:
        kube = KubeApiServer(Path(folder) / "kube")
        try:
            with RealWorld(planned, Path(folder) / "world", kube) as world:
                found = world.run()
                print(f"  {world.clients.sent} requests, {len(world.lost)} lost, all of them for a reason or listed")
                return found
        finally:
            kube.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--hours", type=float, default=0.0, help="virtual hours in all, ten a seed")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes on real servers in all, ten a seed")
    parser.add_argument("--shrink", action="store_true", help="leave out every fault that a failure does not need")
    parser.add_argument("--quiet", action="store_true", help="no schedules")
    options = parser.parse_args()
    if options.hours <= 0.0 and options.minutes <= 0.0:
        parser.error("nothing to play: give --hours or --minutes")
    logging.disable(logging.CRITICAL)
    from tests.chaos.virtual_world import schedule as virtual

    runs = [(play, virtual(seed, hours), f"{hours:g} h") for seed, hours in parts(options.seed, options.hours, 10.0)]
    if options.minutes:
        from tests.chaos.real_world import schedule as real

        for seed, minutes in parts(options.seed, options.minutes, 10.0):
            runs.append((play_real, real(seed, 60.0 * minutes), f"{minutes:g} minutes on real servers"))
    failed = []
    for run, planned, length in runs:
        began_s = time.monotonic()
        found = run(planned)
        took_s = time.monotonic() - began_s
        print(
            f"seed {planned.seed}: {length}, {len(planned.events)} faults, {len(found)} violations, {took_s:.0f} s",
            flush=True,
        )
        if not found:
            continue
        failed.append(planned.seed)
        print(*summary(found), sep="\n", flush=True)
        if options.shrink:
            planned = shrunk(planned, lambda smaller, run=run: bool(run(smaller)))
            print("with only these faults:", *summary(run(planned)), sep="\n")
        if not options.quiet:
            print(planned, flush=True)
    print(f"failed: {failed}" if failed else "all held")
    return bool(failed)


def parts(first: int, whole: float, most: float) -> list[tuple[int, float]]:
    """Seeds, and the length that each plays."""
    count = math.ceil(whole / most)
    return [(first + place, min(most, whole - place * most)) for place in range(count)]


if __name__ == "__main__":
    from servers import Missing

    try:
        sys.exit(main())
    except Missing as missing:
        sys.exit(f"error: {missing}")
