"""A process that hosts controllers shares one heap among its threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, tempfile, threading
from autoscaler.hosting.process import prepare
prepare("text")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
all_there = threading.Barrier(6)
def work():
    libc.malloc(ctypes.c_size_t(4096))
    all_there.wait(30)
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().decode().count("<heap nr="))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_info is glibc's")
@pytest.mark.parametrize(("chosen", "shares"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_its_threads_share_one_heap_unless_an_operator_has_chosen(chosen: dict[str, str], shares: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | chosen
    command = [sys.executable, "-c", THREADS]
    heaps = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert (int(heaps) == 1) == shares
