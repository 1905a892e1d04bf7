"""A Prometheus in this process: it scrapes made-up targets on a virtual clock and answers the real client.

Requests to its address never reach a socket: the adapter of `requests` hands them over. It fails as it is told.
This module must not know what scrapes it, nor who asks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import requests
from requests.adapters import HTTPAdapter

from tests.chaos.promql import Series, Store, UnknownPromQLError, evaluate

URL = "http://prometheus.test:9090"
text_of = lru_cache(maxsize=512)(unquote_plus)
"""The queries of a tick are those of the last one, and long."""
Exposed = Iterable[tuple[str, Mapping[str, str], float]]
"""Metric names, labels and values of one scrape of one target."""


class FakePrometheus:
    """Samples in memory.

    Args:
        now: virtual time, Unix seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.store = Store()
        self.fault = ""
        """What its answers are instead of answers; a kind of `answer`."""
        self.unanswerable = ""
        """The first query that is beyond it, and why: a fault of this fake and not of who asks."""
        self.ahead_s = 0.0
        self.frozen_s: float | None = None
        self._targets: dict[tuple[str, str], list[Series]] = {}

    @property
    def time_s(self) -> float:
        """Its own clock."""
        return self._now() + self.ahead_s if self.frozen_s is None else self.frozen_s

    def scrape(self, targets: Mapping[tuple[str, str], tuple[Mapping[str, str], Exposed]]) -> None:
        """One scrape of every target: (job, instance) to labels and what it exposes. Others are gone."""
        at_s = self.time_s
        self.store.memory.clear()
        for gone in set(self._targets) - set(targets):
            for series in self._targets.pop(gone):
                series.ended_s = at_s
        for (job, instance), (labels, exposed) in targets.items():
            found = []
            for name, own, value in [*exposed, ("up", {}, 1.0)]:
                full = {**(labels if name != "up" else {}), "job": job, "instance": instance, **own}
                key = tuple(sorted(full.items()))
                group = self.store.setdefault(name, {})
                if key not in group:
                    group[key] = Series({**full, "__name__": name})
                if not group[key].times or at_s > group[key].times[-1]:
                    group[key].add(at_s, value)
                found.append(group[key])
            self._targets[job, instance] = found

    def forget(self, before_s: float = math.inf) -> None:
        """Drop series without a sample since then."""
        self.store.memory.clear()
        for name, group in list(self.store.items()):
            for key in [key for key, series in group.items() if series.times[-1] < before_s]:
                del group[key]
            if not group:
                del self.store[name]

    def answer(self, request: requests.PreparedRequest) -> requests.Response:
        """What the client gets.

        Raises:
            requests.RequestException: when it gets nothing.
        """
        fault = self.fault
        if fault == "down":
            raise requests.ConnectionError("[Errno 111] Connection refused")
        if fault == "slow":
            raise requests.ReadTimeout("Read timed out. (read timeout=2.0)")
        if fault == "cut":
            raise requests.exceptions.ChunkedEncodingError("Connection broken: IncompleteRead(7 bytes read)")
        if fault.isdigit():
            return self._respond(int(fault), f"<h1>{fault}</h1>")
        if fault == "HTML":
            return self._respond(200, "<!doctype html><title>Sign in</title>")
        parts = urlsplit(str(request.url))
        body = request.body.decode() if isinstance(request.body, bytes) else request.body or ""
        fields = [field.partition("=") for field in f"{parts.query}&{body}".split("&") if field]
        asked = {name: text_of(value) for name, _, value in fields}
        if not parts.path.endswith("/query"):
            data: Any = sorted(self.store) if parts.path.endswith("/__name__/values") else []
            return self._success(data)
        at_s = float(asked["time"]) if "time" in asked and self.frozen_s is None else self.time_s
        try:
            found = evaluate(asked["query"], self.store, at_s)
        except UnknownPromQLError as error:
            self.unanswerable = self.unanswerable or f"{asked['query']}: {error}"
            return self._respond(400, json.dumps({"status": "error", "error": str(error)}), "application/json")
        if isinstance(found, float):
            return self._success({"resultType": "scalar", "result": [at_s, _text(found)]})
        if fault == "matrix":
            rows = [{"metric": dict(one.labels), "values": [[at_s, _text(one.value)]]} for one in found]
            return self._success({"resultType": "matrix", "result": rows})
        if fault == "nulls":
            return self._success({"resultType": "vector", "result": [{"metric": None, "value": None} for _ in found]})
        rows = [{"metric": dict(one.labels), "value": [at_s, _text(one.value)]} for one in found]
        return self._success({"resultType": "vector", "result": rows})

    def _success(self, data: Any) -> requests.Response:
        return self._respond(200, json.dumps({"status": "success", "data": data}), "application/json")

    @staticmethod
    def _respond(status: int, text: str, kind: str = "text/html") -> requests.Response:
        made = requests.Response()
        made.status_code = status
        made._content = text.encode()
        made.headers["Content-Type"] = kind
        made.encoding = "utf-8"
        made.reason = "made up"
        return made

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """While inside, `URL` leads here."""
        real = HTTPAdapter.send

        def send(adapter: HTTPAdapter, request: requests.PreparedRequest, *args: Any, **options: Any) -> Any:
            if not str(request.url).startswith(URL):
                return real(adapter, request, *args, **options)
            made = self.answer(request)
            made.request, made.url = request, str(request.url)
            return made

        HTTPAdapter.send = send  # type: ignore[method-assign]
        try:
            yield
        finally:
            HTTPAdapter.send = real  # type: ignore[method-assign]


def _text(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(float(value))
