"""HTTP answers that end in time and within a size, for clients that stand on urllib3.

urllib3's time-outs, and so those of requests and of the Kubernetes client, are between two bytes: an answer that drips
never ends. Here the time-out with which an answer is begun is that of the whole answer.
This module must not know who is asked, nor what.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

from requests import PreparedRequest, RequestException
from requests.adapters import HTTPAdapter
from urllib3 import PoolManager, Timeout

from autoscaler.answer_size import AnswerTooLargeError, whole

PART_BYTES = 2**16


class _InTime(io.RawIOBase):
    """What a socket receives until the time-out is over that it has when this is made."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw, self._connection = raw, connection
        timeout_s = connection.gettimeout()
        self._until_s = None if timeout_s is None else time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._until_s is not None:
            left_s = self._until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            self._connection.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_InTime(self.fp.detach(), sock))


def bound(manager: PoolManager) -> None:
    """Let every answer over connections that a pool manager makes from now on end in time."""
    pools: dict[str, Any] = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: _bounded(pool) for scheme, pool in pools.items()}


def _bounded(pool: Any) -> type:
    kind = pool.ConnectionCls
    connection = type(kind.__name__, (kind,), {"response_class": _Response})
    return type(pool.__name__, (pool,), {"ConnectionCls": connection})  # its name is in what users are told


class BoundedAdapter(HTTPAdapter):
    """For sessions of requests: a time-out in seconds is that of connecting, sending and the whole answer together."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """As the base, bounded."""
        super().init_poolmanager(*args, **options)
        bound(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """As the base, bounded."""
        new = proxy not in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if new:
            bound(manager)
        return manager

    def send(
        self, request: PreparedRequest, stream: bool = False, timeout: Any = None, *more: Any, **options: Any
    ) -> Any:
        """As the base, and what is not streamed is read here."""
        in_all: Any = Timeout(total=timeout)
        response = super().send(request, stream, in_all, *more, **options)
        if not stream and response._content is False:  # not read yet
            try:
                response._content = whole(response.iter_content(PART_BYTES))
            except AnswerTooLargeError as error:
                response.close()
                raise RequestException(str(error), request=request) from None
        return response
