"""What lies under one path of the API server, kept up to date by a watch instead of being listed each time.

A list, then its changes from that version on; the server ends each watch after `watch_s`, and the next goes on from
where the last one ended. A version that the server no longer knows (410) is listed anew. What cannot be watched is
unknown: nothing is served that is older than a watch may be silent, nor anything at all after a failure, until the
watch stands again.
This module must not know what is watched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from autoscaler.actuators.kube_api import EventStream, Json, KubeApi, KubeError

Entry = TypeVar("Entry")

GONE = 410
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
IDLE_S = 300.0
"""A watch that nobody has read for so long ends; the next read begins it again."""
MAX_ENTRIES = 50_000


class KubeWatch(Generic[Entry]):
    """The objects of one path, each reduced to what is needed of it.

    Args:
        api: the server.
        path: of the list.
        keep: what is kept of an object.
        query: selectors of the list.
    """

    def __init__(self, api: KubeApi, path: str, keep: Callable[[Json], Entry], query: Mapping[str, str]) -> None:
        self._api, self._path, self._keep, self._query = api, path, keep, dict(query)
        self._max_age_s = api.connection.watch_s + 2 * api.connection.timeout_s
        self._state = threading.Condition()  # guards all that follows
        self._entries: dict[str, Entry] = {}
        self._version = ""  # that the entries are at; empty: to be listed
        self._proved_s = -float("inf")  # when the watch was last known to stand
        self._error: KubeError | None = None
        self._trying, self._failures = False, 0
        self._hurry = self._closed = False
        self._read_s = 0.0
        self._thread: threading.Thread | None = None
        self._stream: EventStream | None = None

    def read(self) -> list[Entry]:
        """All that there is now, at most `watch_s` and two time-outs old.

        Raises:
            KubeError: when it cannot be watched; it is tried once more before that is said.
        """
        until_s = self._api.until_s()
        with self._state:
            self._read_s = time.monotonic()
            self._supervise()
            if not self._stands():
                self._hurry = True
                self._state.notify_all()
                # An attempt that is under way may have begun before what was wrong has ended.
                enough = self._failures + (2 if self._trying else 1)
                while not self._stands() and self._failures < enough and time.monotonic() < until_s:
                    self._state.wait(until_s - time.monotonic())
            if not self._stands():
                raise self._error or KubeError(0, "the watch is silent")
            return list(self._entries.values())

    def close(self) -> None:
        """End the watch; a later `read` begins it again."""
        with self._state:
            self._closed = True
            self._state.notify_all()
            stream = self._stream
        if stream is not None:
            stream.close()

    def _stands(self) -> bool:
        return self._error is None and time.monotonic() - self._proved_s <= self._max_age_s

    def _supervise(self) -> None:
        """A thread that ended, whatever the reason, is begun again."""
        self._closed = False
        if self._thread is None or not self._thread.is_alive():
            self._version, self._proved_s = "", -float("inf")
            self._thread = threading.Thread(target=self._work, name="jevons-watch", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        pause_s, relisted = FIRST_PAUSE_S, False
        while self._wanted():
            try:
                self._follow()
                pause_s, relisted = FIRST_PAUSE_S, False
            except Exception as error:  # nothing that comes from outside may end the thread
                self._version = ""
                if isinstance(error, KubeError) and error.status == GONE and not relisted:
                    relisted = True  # nothing is wrong: that version is only too old
                    continue
                self._failed(error)
                with self._state:
                    if not self._hurry:
                        self._state.wait(pause_s)
                pause_s = min(2.0 * pause_s, LAST_PAUSE_S)

    def _wanted(self) -> bool:
        with self._state:
            self._hurry = False
            self._trying = not self._closed and time.monotonic() - self._read_s < IDLE_S
            if not self._trying:
                self._entries, self._version, self._thread = {}, "", None
            return self._trying

    def _failed(self, error: Exception) -> None:
        with self._state:
            self._error = error if isinstance(error, KubeError) else KubeError(0, f"{type(error).__name__}: {error}")
            self._trying, self._failures = False, self._failures + 1
            self._state.notify_all()

    def _follow(self) -> None:
        """One watch, after a list where that is needed."""
        if not self._version:
            self._list()
        stream = self._api.watch(self._path, self._api.connection.watch_s, **self._query, resourceVersion=self._version)
        began_s = time.monotonic()
        with self._state:
            self._stream = stream
            self._prove()
        for event in stream:
            changed = event["object"]
            entry = self._kept(changed) if event["type"] in ("ADDED", "MODIFIED") else None
            with self._state:
                if entry is not None:
                    self._entries[changed["metadata"]["name"]] = entry
                elif event["type"] == "DELETED":
                    self._entries.pop(changed["metadata"].get("name", ""), None)
                self._version = changed["metadata"]["resourceVersion"]
                self._bounded(len(self._entries))
                self._prove()
        with self._state:  # it ended as it should: until now it stood
            self._prove()
            if time.monotonic() - began_s < FIRST_PAUSE_S:
                self._state.wait(FIRST_PAUSE_S)  # whoever ends it at once must not be asked all the time

    def _list(self) -> None:
        entries: dict[str, Entry] = {}
        version = ""
        for page in self._api.pages(self._path, **self._query):
            for item in page["items"]:
                entry = self._kept(item)
                entries[item["metadata"]["name"]] = entry
            self._bounded(len(entries))
            version = str(page["metadata"].get("resourceVersion") or "")
        if not version:
            raise KubeError(0, "a list without a version")
        with self._state:
            self._entries, self._version = entries, version

    def _kept(self, item: Json) -> Entry:
        try:
            return self._keep(item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = item["metadata"].get("name", "") if isinstance(item, dict) else ""
            raise KubeError(0, f"an object of another shape: {name}: {type(error).__name__}: {error}") from None

    def _bounded(self, count: int) -> None:
        if count > MAX_ENTRIES:
            raise KubeError(0, f"more than {MAX_ENTRIES} objects")

    def _prove(self) -> None:
        """The watch stands."""
        self._proved_s, self._error, self._trying = time.monotonic(), None, False
        self._state.notify_all()
