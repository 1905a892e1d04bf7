"""``python -m tests.chaos.soak``: the learned policy acts at its own interval for hours; does the controller stay flat?

Many services of emulated engines behind a real HAProxy, with bursts. Memory, threads and descriptors of the process
`jevons run` and the size of its database are sampled; a regression line through each is the verdict.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import played_fleet
import yaml
from kube_objects import create_deployment
from kube_server import KubeApiServer
from servers import Controller, HAProxy, Missing, Prometheus, free_port, wait_until
from slow_engine import slow_engine

from autoscaler.hosting.config import LiveConfig
from autoscaler.records.database import Database
from autoscaler.records.ticks import read_ticks
from tests.chaos.clients import Clients
from tests.chaos.hostile_fleet import HostileFleet

SAMPLE_S, BOOT_S, LOOK_S = 5.0, 10.0, 3.0
WARM_UP_SHARE = 0.5
"""Of a run, left out at its beginning: windows of an hour and the database's caches fill, pools open connections."""
GROWTH_PER_HOUR = 0.01
"""A quantity is flat that grows by less than this share of its mean in an hour."""
LEAST_S = 1800.0
"""A shorter run tells nothing: the controller still fills its windows."""
STRETCHES, STUDENT_95 = 10, 2.306
"""Of a run; and Student's quantile for the slope of a line through so many points."""
PROFILE = slow_engine(c_us_per_seq=5000.0, max_num_seqs=32, warmup_s=BOOT_S)
QUANTITIES = ("rss_bytes", "threads", "descriptors")


@dataclass(frozen=True)
class Sample:
    """One look at the process."""

    time_s: float
    rss_bytes: float
    threads: float
    descriptors: float
    database_bytes: float


@dataclass(frozen=True)
class Line:
    """A least-squares line through one quantity.

    Attributes:
        mean: over the samples.
        per_hour: its slope.
        low: end of the slope's 95 % interval.
        high: the other end.
        verdict: `flat` or `grows` where the whole interval says so, else `unsure`.
    """

    mean: float
    per_hour: float
    low: float
    high: float
    verdict: str


def line(times_s: Sequence[float], values: Sequence[float]) -> Line:
    """The regression line of a quantity, through the means of `STRETCHES` equal stretches.

    Neighbouring samples resemble each other too much to count one by one; the interval is Student's on the means.
    """
    parts = [part for part in np.array_split(np.arange(len(times_s)), STRETCHES) if len(part)]
    x, y = (np.array([np.array(of, float)[part].mean() for part in parts]) for of in (times_s, values))
    mean, spread = float(np.mean(values)), float(((x - x.mean()) ** 2).sum()) / 3600.0**2
    if len(parts) < STRETCHES or times_s[-1] - times_s[0] < LEAST_S:
        return Line(mean, 0.0, -math.inf, math.inf, "unsure")
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / 3600.0 / spread
    rest = y - y.mean() - slope * (x - x.mean()) / 3600.0
    half = STUDENT_95 * math.sqrt(float((rest**2).sum()) / (STRETCHES - 2) / spread)
    low, high, most = slope - half, slope + half, GROWTH_PER_HOUR * mean
    return Line(mean, slope, low, high, "grows" if low > most else "flat" if high <= most else "unsure")


def look(pid: int, database: Path, began_s: float) -> Sample:
    """What Linux says of a process, and the size of its database."""
    process = Path(f"/proc/{pid}")
    fields = dict(row.split(":", 1) for row in (process / "status").read_text().splitlines() if ":" in row)
    files = [file for file in database.parent.glob(f"{database.name}*") if file.is_file()]
    return Sample(
        time_s=time.monotonic() - began_s,
        rss_bytes=1024.0 * int(fields["VmRSS"].split()[0]),
        threads=float(fields["Threads"]),
        descriptors=float(len(list((process / "fd").iterdir()))),
        database_bytes=float(sum(file.stat().st_size for file in files)),
    )


def config(
    folder: Path, names: Sequence[str], prometheus: Prometheus, haproxy: HAProxy, kubeconfig: Path, port: int
) -> LiveConfig:
    """All services in one controller."""
    connection = {"kubeconfig": kubeconfig, "timeout_s": 5.0, "deadline_s": 10.0}
    services = [
        {
            "service": name,
            "slo": {"ttft_s": 2.5, "tpot_s": 0.2, "attainment": 0.9},
            "pools": [{"engine": PROFILE, "min_replicas": 1, "max_replicas": 4}],
        }
        for name in names
    ]
    data = {
        "name": "soak",
        "services": services,
        "metrics": {"url": prometheus.url, "gateway": "haproxy", "gateway_label": "proxy", "timeout_s": 5.0},
        "actuator": {
            "kind": "composite",
            "replicas": {"kind": "kubernetes", "connection": connection, "replica_port": port},
            "batch_cap": {"kind": "haproxy", "sockets": [str(haproxy.socket)], "route": ["*"]},
            "drain_s": 30.0,
        },
        "mode": "act",
        "policy": {"reference": "learned", "cache": folder / "policies"},
        "kill_file": folder / "STOP",
        "records": {"url": f"sqlite:///{folder / 'jevons.db'}"},
        "exposition": {"port": 0},
        "limits": {"read_s": 14.0, "permit_s": 14.0, "act_s": 20.0},
    }
    return LiveConfig.model_validate(data)


def soak(folder: Path, minutes: float, services: int, say: Any = print) -> dict[str, Any]:
    """Run it; samples and verdicts."""
    played_fleet.LOOK_S = LOOK_S  # twenty kubelets on one machine
    names = [f"service-{number:02d}" for number in range(services)]
    with ExitStack() as stack:
        kube = KubeApiServer(folder / "kube")
        stack.callback(kube.stop)
        prometheus = Prometheus(folder / "prometheus", scrape_s=5.0)
        stack.callback(prometheus.stop)
        haproxy = HAProxy(folder / "haproxy", names)
        stack.callback(haproxy.stop)
        prometheus.scrape([(f"127.0.0.1:{haproxy.metrics_port}", {"job": "haproxy"})], "-haproxy")
        port = free_port()
        for row, name in enumerate(names):
            create_deployment(kube, name, 1)
            stack.callback(HostileFleet(row, kube, prometheus, name, PROFILE, BOOT_S, port).stop)
        path = folder / "soak.yaml"
        live = config(folder, names, prometheus, haproxy, kube.kubeconfig, port)
        path.write_text(yaml.safe_dump(live.model_dump(mode="json", exclude_none=True)))
        controller = Controller(folder, path, "--no-ray")
        stack.callback(controller.stop)
        wait_until(lambda: all(haproxy.serves(name) for name in names), "every service has a server", limit_s=300.0)
        clients = Clients({name: haproxy.url(name) for name in names}, 0, (0.1, 0.3, 6.0), (30.0, 240.0))
        began_s, samples, answers = time.monotonic(), [], []
        while (now_s := time.monotonic() - began_s) < 60.0 * minutes:
            if controller.process.poll() is not None:
                raise AssertionError(f"jevons run ended: {controller.log.read_text(errors='replace')[-1000:]}")
            samples.append(look(controller.process.pid, folder / "jevons.db", began_s))
            answers += clients.take()
            if len(samples) % 60 == 0:
                say(f"{now_s / 60:.0f} minutes: {samples[-1]}")
            time.sleep(SAMPLE_S)
        clients.stop()
        answers += clients.take()
        alive = haproxy.process.poll() is None
        database = Database(live.database_url)
        ticks = read_ticks(database)
        database.close()
    skip_s = WARM_UP_SHARE * 60.0 * minutes
    kept = [sample for sample in samples if sample.time_s >= skip_s]
    times_s = [sample.time_s for sample in kept]
    lines = {
        name: line(times_s, [getattr(sample, name) for sample in kept]) for name in (*QUANTITIES, "database_bytes")
    }
    scaled = sum(int((tick.arrays["outcome"] == 1).sum()) for tick in ticks)
    growth = kept[-1].database_bytes - kept[0].database_bytes
    decided = services * sum(kept[0].time_s <= tick.time_s - ticks[0].time_s <= kept[-1].time_s for tick in ticks)
    return {
        "minutes": minutes,
        "services": services,
        "ticks": len(ticks),
        "learned_share": float(np.mean([np.mean(tick.arrays["rung"] == 0) for tick in ticks])) if ticks else 0.0,
        "scaled": scaled,
        "requests": len(answers),
        "lost": sum(answer.outcome != "done" for answer in answers),
        "haproxy_alive": alive,
        "database_bytes_per_decision": growth / max(decided, 1),
        "lines": {name: asdict(found) for name, found in lines.items()},
        "grows": [name for name in QUANTITIES if lines[name].verdict == "grows"],
        "samples": [asdict(sample) for sample in samples],
    }


def report(found: dict[str, Any]) -> str:
    """The verdict in a few sentences."""
    units = {"rss_bytes": ("MB", 1e6), "threads": ("", 1.0), "descriptors": ("", 1.0), "database_bytes": ("MB", 1e6)}
    rows = [
        f"{found['minutes']:g} minutes, {found['services']} services: {found['ticks']} ticks "
        f"({found['learned_share']:.0%} by the learned policy), {found['scaled']} changes, "
        f"{found['requests']} requests, {found['lost']} lost; HAProxy {'lives' if found['haproxy_alive'] else 'DIED'}"
    ]
    for name, (unit, size) in units.items():
        one = found["lines"][name]
        mean, slope, low, high = (one[key] / size for key in ("mean", "per_hour", "low", "high"))
        verdict = "" if name == "database_bytes" else f": {one['verdict']}"
        rows.append(f"{name}: mean {mean:.4g} {unit}, {slope:+.3g} {unit} an hour ({low:+.3g} to {high:+.3g}){verdict}")
    rows.append(f"database: {found['database_bytes_per_decision']:.0f} bytes a decision")
    return "\n".join(rows)


def drawn(found: dict[str, Any]) -> str:
    """The samples as an SVG picture, one strip a quantity."""
    samples, width, height = found["samples"], 800, 140
    last_s = max(samples[-1]["time_s"], 1.0)
    parts = []
    for place, name in enumerate((*QUANTITIES, "database_bytes")):
        values = [sample[name] for sample in samples]
        low, span = min(values), max(max(values) - min(values), 1e-9)
        points = " ".join(
            f"{60 + sample['time_s'] / last_s * (width - 80):.1f},"
            f"{place * height + 120 - (sample[name] - low) / span * 85:.1f}"
            for sample in samples
        )
        parts.append(f'<text x="60" y="{place * height + 24}">{name}: {low:.4g} to {low + span:.4g}</text>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="#1f77b4"/>')
    size = f'width="{width}" height="{4 * height}"'
    style = 'font-family="sans-serif" font-size="14"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0, help="length of the run")
    parser.add_argument("--services", type=int, default=20, help="how many, at most 200")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder for soak.json and soak.svg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.minutes, options.services, lambda text: print(text, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(found, indent=1))
    (options.out / "soak.svg").write_text(drawn(found))
    print(report(found))
    return bool(found["grows"] or found["lost"] or not found["haproxy_alive"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Missing as missing:
        sys.exit(f"error: {missing}")
