"""A controller that stands still at its third tick: `python stalled_controller.py FOLDER HOW`.

HOW is `native`, code that never gives the interpreter lock back, or `waiting`, which does and never returns.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.service import LiveService
from policies.spec import InterfaceSpec, WindowSpec

INTERVAL_S = LIMIT_S = 1.0


def main(folder: Path, how: str) -> None:
    """Run it until it ends itself."""
    window = WindowSpec(control_interval_s=INTERVAL_S, metrics_delay_s=0.0)
    spec = service_spec().model_copy(update={"interface": InterfaceSpec(window=window)})
    world = LiveWorld([spec], [burst()])
    stages = ("read_s", "decide_s", "record_s", "permit_s", "act_s", "conclude_s", "route_s")
    metrics = {"url": "http://127.0.0.1:9", "deadline_s": LIMIT_S / 2}
    limits = dict.fromkeys(stages, LIMIT_S)
    config = live_config(folder, spec, limits=limits, metrics=metrics, exposition={"port": 0})
    service = LiveService(config, source=world, actuator=world, clock=world)
    world.watch = service.state
    judge, ticks = service.supervisor.judge, []

    def stand_still(*arguments: object) -> object:
        ticks.append(1)
        if len(ticks) == 3:
            print(service.metrics_port, flush=True)
            if how == "native":
                ctypes.PyDLL(None).sleep(600)
            threading.Event().wait(600.0)
        return judge(*arguments)  # type: ignore[arg-type]

    service.supervisor.judge = stand_still  # type: ignore[method-assign,assignment]
    service.run(Watchdog())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
