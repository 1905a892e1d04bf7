"""A process that does not answer, or slowly; the real server's part is in `tests/integration`."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autoscaler.actuators import haproxy_api
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.actuators.haproxy_api import HAProxyError, RuntimeApi
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

TIMEOUT_S = 0.1


class HangingProcess:
    """Takes connections, and answers none of them."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "admin.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(64)
        self._listener.setblocking(False)

    def asked(self) -> int:
        """How many connections there were since the last look."""
        count = 0
        while True:
            try:
                self._listener.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1

    def stop(self) -> None:
        self._listener.close()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[HangingProcess]:
    process = HangingProcess(tmp_path)
    yield process
    process.stop()


@pytest.mark.parametrize("cap", ["9" * 400, "9" * 20, "16x", "²"])
def test_a_number_that_is_none_is_an_answer_of_another_shape(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "show stat -1 6 -1": f"# pxname,svname,slim\nchat,jevons-1,{cap}\nchat,BACKEND,",
        "show servers state": "1\n"
        "# be_name srv_name srv_addr srv_op_state srv_admin_state srv_check_state srv_port a b c d\n"
        "chat jevons-1 10.0.0.1 2 0 0 8000 - - - -\n",
    }
    monkeypatch.setattr(RuntimeApi, "ask", lambda _, command, *__: answers[command])
    with pytest.raises(HAProxyError, match="an answer of another shape"):
        RuntimeApi("/nowhere", TIMEOUT_S).servers("chat")
    answers["show stat -1 6 -1"] = answers["show stat -1 6 -1"].replace(cap, "16")
    assert RuntimeApi("/nowhere", TIMEOUT_S).servers("chat")["jevons-1"].cap == 16


def test_a_process_that_hangs_costs_one_wait_however_many_backends_it_has(hanging: HangingProcess) -> None:
    api = RuntimeApi(hanging.address, TIMEOUT_S)
    for number in range(20):
        with pytest.raises(HAProxyError, match="timed out"):
            api.servers(f"service-{number}")
    assert hanging.asked() == 1


def test_a_process_that_hung_is_asked_again(hanging: HangingProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoscaler.actuators.haproxy_api.SHARED_S", -1.0)  # at once
    api = RuntimeApi(hanging.address, TIMEOUT_S)
    for _ in range(2):
        with pytest.raises(HAProxyError, match="timed out"):
            api.servers("chat")
    assert hanging.asked() == 2


STAT = "# pxname,svname,slim\nchat,BACKEND,\nchat,r1,16\n"
STATE = """1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight srv_check_state srv_port
3 chat 1 r1 10.0.0.1 2 0 1 1 6 8000
"""


class Played(RuntimeApi):
    """A process with one backend that answers after a while."""

    def __init__(self, address: str, takes_s: float = 0.0, together: threading.Barrier | None = None) -> None:
        super().__init__(address, 5.0)
        self.asked: list[str] = []
        self._takes_s, self._together = takes_s, together

    def ask(self, command: str, until_s: float | None = None) -> str:
        self.asked.append(command)
        if self._together is not None:
            self._together.wait()
        time.sleep(self._takes_s)
        return STAT if command.startswith("show stat") else STATE


def test_a_process_that_is_slow_costs_one_reading_however_many_backends_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy_api, "SHARED_S", 0.01)
    api = Played("/slow.sock", takes_s=0.2)
    for _ in range(20):
        assert api.servers("chat")["r1"].cap == 16
    assert len(api.asked) == 2


def test_all_processes_are_asked_at_once_and_each_of_them_once() -> None:
    """Each answers only when all have been asked: together they take no longer than one may."""
    specs = [
        ScalingSpec(
            service=name,
            slo=Slo(ttft_s=0.5, tpot_s=0.05),
            pools=(PoolSpec(engine=find_engine("llama-3.1-8b-h100", Path()), max_replicas=8),),
        )
        for name in ("chat", "code")
    ]
    sockets = ("/a.sock", "/b.sock", "/c.sock")
    made = HAProxyActuator(HAProxyConfig(sockets=sockets, backend="chat"), specs)
    together = threading.Barrier(len(sockets), timeout=10.0)
    processes = [Played(socket, together=together) for socket in sockets]
    made._processes = list(processes)
    state = made.state()
    assert state.problems == ()
    np.testing.assert_array_equal(state.batch_cap, [[48.0], [48.0]])
    assert [len(one.asked) for one in processes] == [2, 2, 2]


def test_a_process_that_drips_is_given_up_after_its_time_out(tmp_path: Path) -> None:
    """Each byte comes in time, and the two commands of a reading share it."""
    address, stopped = str(tmp_path / "admin.sock"), threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(8)

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    while not stopped.wait(0.001):
                        connection.sendall(b"x")

    threading.Thread(target=drip, daemon=True).start()
    began_s = time.monotonic()
    with pytest.raises(HAProxyError, match="timed out"):
        RuntimeApi(address, 0.3).read()
    assert time.monotonic() - began_s < 2.0
    stopped.set()
    listener.close()
