"""Real servers on loopback, each with free ports and a folder of its own, gone when the tests are.

A server whose program is not installed raises `Missing`, with how to get it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.missing import missing_server

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
"""Generous: the machine may be busy."""


class Missing(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """A program is not installed; the message says how to get it."""


def start(make: Any, *arguments: Any, **options: Any) -> Any:
    """A server, or the end of the test where its program is not installed."""
    try:
        return make(*arguments, **options)
    except Missing as missing:
        missing_server(str(missing))


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed: apt-get install -y --no-install-recommends {package}")
    return found


PORTS = range(20_000, 32_000)
"""Below the kernel's own: no client's connection takes one of these between its choice and a server's start."""

_ports = itertools.count(os.getpid() * 997 % len(PORTS))  # tests side by side begin far from each other


def free_port() -> int:
    """A port of loopback on which nobody listens, that this process has not named before."""
    for number in itertools.islice(_ports, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", PORTS[number % len(PORTS)]))
            return PORTS[number % len(PORTS)]
    raise AssertionError(f"no port of {PORTS} is free")


def wait_until(true: Callable[[], object], what: str, limit_s: float = START_S, pause_s: float = 0.05) -> None:
    """Wait for a condition; an exception of the network counts as not yet."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        try:
            if true():
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(pause_s)
    raise AssertionError(f"{what}: not within {limit_s:.0f} s")


def answers(url: str, headers: Mapping[str, str] = {}, context: ssl.SSLContext | None = None) -> bool:
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.urlopen(request, timeout=2, context=context) as response:
        return int(response.status) == 200


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Process:
    """A server that is stopped with `stop`, or by the kernel when the tests die."""

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                preexec_fn=_die_with_parent,
                user=user,
            )

    def wait(self, ready: Callable[[], object], what: str) -> None:
        def alive_and_ready() -> object:
            code = self.process.poll()
            if code is not None:
                raise AssertionError(f"{what} ended with {code}: {self.log.read_text(errors='replace')[-2000:]}")
            return ready()

        try:
            wait_until(alive_and_ready, what)
        except AssertionError:
            self.stop()
            raise

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Engine(Process):
    """An emulated engine, `jevons emulate`, in a process of its own."""

    def __init__(self, folder: Path, *options: str, name: str = "engine", engine: str = "llama-3.1-8b-h100") -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        command = [str(Path(sys.executable).parent / "jevons"), "emulate", "--engine", engine, "--port", str(self.port)]
        super().__init__([*command, *options], folder / f"{name}-{self.port}.log")

    def ready(self) -> Engine:
        self.wait(lambda: answers(f"http://{self.address}/health"), "emulated engine")
        return self


class Guard:
    """A certificate of a certificate authority of its own, and the password that a server asks for.

    Args:
        folder: for keys and certificates.
    """

    USER, PASSWORD = "jevons", "secret"
    BCRYPT = "$2b$04$YwwOP3WBh6kP/635Md9MG.HSI6tQetb5JbrB0G3UIziWe5hNQbL36"
    """Of the password."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca, self.certificate, self.key = (folder / name for name in ("ca.crt", "server.crt", "server.key"))
        request, ca_key, names = folder / "server.csr", folder / "ca.key", folder / "names"
        names.write_text("subjectAltName=IP:127.0.0.1\n")
        new = ["-newkey", "rsa:2048", "-nodes"]
        signer = ["-CA", str(self.ca), "-CAkey", str(ca_key), "-CAcreateserial", "-days", "2"]
        for command in (
            ["req", "-x509", *new, "-keyout", str(ca_key), "-out", str(self.ca), "-subj", "/CN=tests", "-days", "2"],
            ["req", *new, "-keyout", str(self.key), "-out", str(request), "-subj", "/CN=127.0.0.1"],
            ["x509", "-req", "-in", str(request), "-out", str(self.certificate), "-extfile", str(names), *signer],
        ):
            subprocess.run([program("openssl", "openssl"), *command], check=True, capture_output=True)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{self.USER}:{self.PASSWORD}".encode()).decode()}

    def options(self, folder: Path) -> list[str]:
        """For a Prometheus."""
        files = {"cert_file": str(self.certificate), "key_file": str(self.key)}
        config = {"tls_server_config": files, "basic_auth_users": {self.USER: self.BCRYPT}}
        (folder / "web.yml").write_text(yaml.safe_dump(config))
        return [f"--web.config.file={folder / 'web.yml'}"]


PROMETHEUS_3 = Path(os.environ.get("JEVONS_PROMETHEUS_3") or Path.home() / ".cache/jevons/prometheus-3/prometheus")
"""A second Prometheus beside the one of the system."""


def prometheus_program(major: int) -> str:
    """The system's Prometheus 2, or Prometheus 3 from where `.ci/servers` unpacks it."""
    if major == 2:
        return program("prometheus", "prometheus")
    if not PROMETHEUS_3.exists():
        raise Missing(f"there is no {PROMETHEUS_3}: run .ci/servers as root on Debian, or set JEVONS_PROMETHEUS_3")
    return str(PROMETHEUS_3)


class Prometheus(Process):
    """Prometheus with files of targets, which `scrape` writes.

    Args:
        folder: its own.
        scrape_s: time between two scrapes, seconds.
        guard: certificate and password, none when left out.
        major: its version.
        job: more settings of the scrapes.
        again: the same of those of the second job; as `job` when left out.
        features: what is switched on with `--enable-feature`.
    """

    def __init__(
        self,
        folder: Path,
        scrape_s: float = 1.0,
        guard: Guard | None = None,
        major: int = 2,
        job: Mapping[str, Any] = {},
        features: Sequence[str] = (),
        again: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self._guard = folder, free_port(), guard
        self._program, self._features = prometheus_program(major), features
        self.url = f"{'https' if guard else 'http'}://127.0.0.1:{self.port}"
        (folder / "targets.json").write_text("[]")
        interval = f"{round(scrape_s * 1000)}ms"
        config = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval},
            "scrape_configs": [
                {
                    "job_name": name,
                    "file_sd_configs": [{"files": [str(folder / files)], "refresh_interval": "1s"}],
                    **settings,
                }
                for name, files, settings in (
                    ("tests", "targets*.json", job),
                    ("again", "again.json", job if again is None else again),
                )
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._start()

    def _start(self) -> None:
        Process.__init__(
            self,
            [
                self._program,
                f"--config.file={self.folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--web.enable-lifecycle",
                "--scrape.discovery-reload-interval=1s",
                *(f"--enable-feature={one}" for one in self._features),
                *(self._guard.options(self.folder) if self._guard else ()),
            ],
            self.folder / "prometheus.log",
        )
        self.wait(lambda: self._answers("/-/ready"), "Prometheus")

    def restart(self) -> None:
        self._start()

    @property
    def _headers(self) -> dict[str, str]:
        return self._guard.headers if self._guard else {}

    @property
    def _context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=str(self._guard.ca)) if self._guard else None

    def _answers(self, path: str) -> bool:
        return answers(f"{self.url}{path}", self._headers, self._context)

    def scrape(self, groups: Sequence[tuple[str, Mapping[str, str]]], owner: str = "") -> None:
        """Scrape these, (address, labels), in the place of what the same owner named before."""
        self._write(self.folder / f"targets{owner}.json", groups)

    def relabel(self, rule: Mapping[str, Any]) -> None:
        """Relabel every series that is scraped from now on."""
        file = self.folder / "prometheus.yml"
        config = yaml.safe_load(file.read_text())
        for job in config["scrape_configs"]:
            job["metric_relabel_configs"] = [dict(rule)]
        file.write_text(yaml.safe_dump(config))
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/reload", method="POST"), timeout=10).close()

    def scrape_again(self, groups: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        """Scrape these in a second job as well."""
        self._write(self.folder / "again.json", groups)

    @staticmethod
    def _write(targets: Path, groups: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        partial = targets.with_suffix(".partial")
        partial.write_text(json.dumps([{"targets": [at], "labels": dict(labels)} for at, labels in groups]))
        partial.replace(targets)

    def wait_scraped(self, addresses: Sequence[str]) -> None:
        """Until each has been scraped; Prometheus takes up new targets after a second or two."""

        active: list[dict[str, Any]] = []

        def scraped() -> bool:
            request = urllib.request.Request(f"{self.url}/api/v1/targets", headers=self._headers)
            with urllib.request.urlopen(request, timeout=5, context=self._context) as response:
                active[:] = json.load(response)["data"]["activeTargets"]
            up = {one["labels"]["instance"] for one in active if one["health"] == "up"}
            return up >= set(addresses)

        try:
            wait_until(scraped, "all targets are scraped")
        except AssertionError as late:
            seen = {one["labels"]["instance"]: (one["health"], one["lastError"]) for one in active}
            log = self.log.read_text(errors="replace")[-2000:]
            raise AssertionError(
                f"{late}; wanted {list(addresses)}, {self.url} scrapes {seen}; its log: {log}"
            ) from late


class HAProxy(Process):
    """HAProxy with backends whose servers come and go through the Runtime API."""

    def __init__(
        self,
        folder: Path,
        backends: Sequence[str],
        servers: Mapping[str, Sequence[tuple[str, str]]] = {},
        health: str = "option httpchk GET /health",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.socket = folder / "haproxy.sock"
        self.ports = {name: free_port() for name in backends}
        self.metrics_port = free_port()
        lines = [
            "global",
            f"  stats socket {self.socket} mode 600 level admin",
            "  log stdout format raw local0 info",
            "  maxconn 4000",
            "defaults",
            "  mode http",
            "  log global",
            "  option httplog",
            # As docs/actuators.md has it.
            "  option http-server-close",
            "  option http-buffer-request",
            "  retries 3",
            "  option redispatch 1",
            "  retry-on conn-failure empty-response 503",
            "  timeout connect 1s",
            "  timeout client 300s",
            "  timeout server 300s",
            "  timeout queue 300s",
            "  timeout check 5s",
            "frontend metrics",
            f"  bind 127.0.0.1:{self.metrics_port}",
            "  http-request use-service prometheus-exporter if { path /metrics }",
        ]
        for name in backends:
            lines += [f"frontend {name}-in", f"  bind 127.0.0.1:{self.ports[name]}", f"  default_backend {name}"]
            lines += [f"backend {name}", "  balance leastconn", f"  {health}"]
            lines += [f"  server {server} {address} maxconn 64" for server, address in servers.get(name, ())]
        (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
        super().__init__(
            [program("haproxy", "haproxy"), "-db", "-f", str(folder / "haproxy.cfg")], folder / "haproxy.log"
        )
        self.wait(lambda: answers(f"http://127.0.0.1:{self.metrics_port}/metrics"), "HAProxy")

    def url(self, backend: str) -> str:
        return f"http://127.0.0.1:{self.ports[backend]}"

    def serves(self, backend: str) -> bool:
        """Whether it has a server that takes requests."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        name = f'haproxy_backend_active_servers{{proxy="{backend}"}} '
        return any(line.startswith(name) and float(line.removeprefix(name)) > 0 for line in lines)


class MLflow(Process):
    """A tracking server with a model registry."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
        # Without its job workers, which would outlive it.
        environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        super().__init__(command, folder / "mlflow.log", environment)
        self.wait(lambda: answers(f"{self.url}/health"), "MLflow")


class Controller(Process):
    """`jevons run` with one configuration.

    Args:
        folder: for its log.
        config: the YAML file.
        options: such as `--no-ray`.
    """

    def __init__(self, folder: Path, config: Path, *options: str) -> None:
        self._jevons = str(Path(sys.executable).parent / "jevons")
        self.config = config
        environment = {"RAY_AUTH_MODE": "disabled", "RAY_enable_worker_prestart": "0"}
        command = [self._jevons, "run", *options, "--config", str(config)]
        super().__init__(command, folder / f"{config.stem}-run.log", environment)

    def order(self, *words: str) -> str:
        """What another `jevons` command on the same configuration says; an error when it fails."""
        command = [self._jevons, *words, "--config", str(self.config)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout

    def down(self) -> None:
        """End in order."""
        self.order("down")
        self.process.wait(120)
