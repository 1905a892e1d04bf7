"""The controller's targets as a custom autoscaling policy of Ray Serve.

In a Serve configuration::

    autoscaling_config:
      min_replicas: 1
      max_replicas: 20
      policy:
        policy_function: autoscaler.hosting.serve_policy:policy

Serve asks ten times a second, for every deployment, inside its control loop: nothing is decided here. The controller
writes its targets to a file, whole or not at all, and this reads them when the file has changed. A target that is
missing or old is no reason to move: the count stays what it is.
This module must not know how targets are decided.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.json_text import read_json

TARGETS_FILE_VARIABLE = "JEVONS_TARGETS_FILE"
"""Environment variable that names the file, in the environment of Serve's controller."""
DEFAULT_TARGETS_FILE = "runs/live/targets.json"
MAX_AGE_S = 120.0
"""Targets older than this are not followed."""

Targets = dict[str, dict[str, dict[str, float]]]
"""By service, by pool: ``replicas``, ``batch_cap`` and ``time_s`` (of the decision, Unix time)."""


def targets_file() -> Path:
    """The file that the controller writes (`targets_file` of the live configuration) and Serve reads."""
    return Path(os.environ.get(TARGETS_FILE_VARIABLE, DEFAULT_TARGETS_FILE))


@dataclass
class _Cache:
    file: Path | None = None
    stamp: tuple[int, int, int] = (0, 0, 0)
    targets: Targets | None = None


_cache = _Cache()


def read_targets(file: Path) -> Targets:
    """The published targets; empty when there are none or the file is damaged. Reads only a file that has changed."""
    try:
        status = file.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if _cache.targets is None or _cache.file != file or _cache.stamp != stamp:
            _cache.targets = read_json(file.read_text(encoding="utf-8"))
            _cache.file, _cache.stamp = file, stamp
    except (OSError, ValueError):
        _cache.targets = None
        return {}
    return _cache.targets if isinstance(_cache.targets, dict) else {}


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """The count that the controller wants, for `policy_function` in an `autoscaling_config`.

    The service is looked up by the name of the deployment, then by that of the application; where it has several
    pools, the pool by the name of the deployment.

    Args:
        context: Serve's `AutoscalingContext`.

    Returns:
        Replicas, within the deployment's bounds, and the policy's state, which is not used.
    """
    targets = read_targets(targets_file())
    pools = targets.get(context.deployment_name) or targets.get(context.app_name or "")
    pools = pools if isinstance(pools, dict) else {}
    entry = pools.get(context.deployment_name) or (next(iter(pools.values())) if len(pools) == 1 else None)
    replicas = _followed(entry)
    if replicas is None:
        replicas = context.target_num_replicas
    lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(lowest, min(highest, replicas)), {}


def _followed(entry: Any) -> int | None:
    """The wanted count of one published pool, None where it is missing, damaged or old."""
    try:
        age_s = time.time() - float(entry["time_s"])
        return int(entry["replicas"]) if -MAX_AGE_S <= age_s <= MAX_AGE_S else None
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
