"""A Ray cluster of this process, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "180",  # a busy machine
}


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A cluster with so many CPUs, which `auto` finds."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.shutdown()  # whatever an earlier test has left
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            configure_logging=False,
        )
        yield
        ray.shutdown()
