"""A Ray cluster that Jevons starts itself: reachable from this host alone, and only with its token.

This module must not import Ray: it must come before it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import Any

from policies.telemetry import turn_off

LOOPBACK = "127.0.0.1"
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def options() -> dict[str, Any]:
    """Arguments of `ray.init` that start such a cluster; to be called before Ray is imported, as it looks only then.

    An authentication mode that the environment names stays. Without one, the cluster asks for the token of
    `keep_token`, unless the environment says which one.

    Raises:
        RuntimeError: when Ray was imported before.
        OSError: when the token cannot be written.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before it could be told to stay on this host; start the cluster first")
    turn_off()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ["RAY_AUTH_MODE"] == "token" and not elsewhere:
        keep_token(Path.home() / ".ray" / "auth_token")
    # On Linux Ray replaces a loopback address by one that other hosts reach, and listens on all interfaces, unless it
    # takes itself for a cluster of one node, as on macOS.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {"address": "local", "_node_ip_address": LOOPBACK, "dashboard_host": LOOPBACK}


def keep_token(path: Path) -> None:
    """Make the token of local clusters for the eyes of its owner alone, and close one that others can read.

    Whoever has it runs what they like as this user, and Ray writes it as the umask says.

    Raises:
        OSError: when it cannot be made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        with contextlib.suppress(OSError):  # mounted for us: who mounted it decides who reads it
            path.chmod(mode & ~OTHERS)
