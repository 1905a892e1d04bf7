"""Results that took long, kept by digest: what was asked, on which traffic, by which version of the code.

A run that is cut off goes on where it stopped, and one that asks for the same again does not compute it again.
This module must not know what the results mean.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.atomic_files import write_text
from training.replaying.scenarios import Scenario

_SOURCES = (
    "policies",
    "envs",
    "autoscaler/controller.py",
    "training/references/clairvoyant.py",
    "training/replaying/world.py",
    "training/replaying/scores.py",
    "training/tuning/studies.py",
    "training/references/timetable.py",
    "training/tuning/tuner.py",
)
"""What a plan or a tuned setting depends on."""


@functools.cache
def code_digest() -> str:
    """SHA-256 over the sources that a kept result depends on."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def scenario_key(scenario: Scenario, seed_digests: Mapping[int, str]) -> dict[str, Any]:
    """What of a scenario a result depends on: its spec and the digest of every seed's trace; not its name."""
    spec = scenario.spec.model_copy(update={"service": "service"})
    return {"spec": spec.digest(), "traces": {str(seed): digest for seed, digest in seed_digests.items()}}


class ResultCache:
    """JSON files in one folder, named by the SHA-256 of their key. Several processes may share it.

    Args:
        folder: made when the first result is kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, kind: str, key: Mapping[str, Any]) -> Any:
        """The result of a key, None when there is none; one that cannot be read counts as none."""
        if self.folder is None:
            return None
        try:
            return json.loads(self._path(kind, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, kind: str, key: Mapping[str, Any], result: Any) -> None:
        """Keep a result; JSON types only.

        Raises:
            OSError: when it cannot be written.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, allow_nan=False)
        write_text(self._path(kind, key), text)

    def _path(self, kind: str, key: Mapping[str, Any]) -> Path:
        assert self.folder is not None
        canonical = json.dumps({**key, "code": code_digest()}, sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:24]}.json"
