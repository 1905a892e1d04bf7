"""A Serve application for tests: answers with its process id."""

from __future__ import annotations

import os
from typing import Any

from ray import serve


def build(options: dict[str, Any]) -> Any:
    @serve.deployment(name=options["name"], ray_actor_options={"num_cpus": 0})
    class Answer:
        def __call__(self, request: Any) -> str:
            return str(os.getpid())

    return Answer.bind()
