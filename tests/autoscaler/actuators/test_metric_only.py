from __future__ import annotations

import numpy as np
import requests
from live_fakes import service_spec

from autoscaler.actuators.metric_only import MetricOnlyActuator, MetricOnlyConfig
from policies.contract import Target


def test_targets_are_served_on_loopback_alone() -> None:
    actuator = MetricOnlyActuator(MetricOnlyConfig(port=0), [service_spec()])
    try:
        actuator.apply(Target(np.array([[3]]), np.array([[64]])))
        assert actuator._server is not None
        assert actuator._server.server_address[0] == "127.0.0.1"
        text = requests.get(f"http://127.0.0.1:{actuator.port}/metrics", timeout=5).text
        assert 'jevons_desired_replicas{pool="llama-3.1-8b-l40s",service="chat"} 3.0' in text
    finally:
        actuator.close()
