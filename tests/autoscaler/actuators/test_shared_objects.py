"""Two pools on one object would set each other's target back at every tick: refused before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoscaler.actuators.config_map import ConfigMapActuator, ConfigMapConfig
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig, ScaleTarget
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig, ServeTarget
from policies.engine import ConfigError
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPECS = [
    ScalingSpec(service=name, slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
    for name in ("chat", "code")
]


def test_of_kubernetes() -> None:
    with pytest.raises(ConfigError, match=r"'chat' and 'code' have one object, .*/deployments/server"):
        KubernetesActuator(KubernetesConfig(target=ScaleTarget(name="server")), SPECS)


def test_of_ray_serve() -> None:
    with pytest.raises(ConfigError, match=r"'chat' and 'code' have one object, deployment server of application llm"):
        RayServeActuator(RayServeConfig(target=ServeTarget(application="llm", deployment="server")), SPECS)
    RayServeActuator(RayServeConfig(target=ServeTarget(application="llm")), SPECS).close()


def test_of_config_maps() -> None:
    with pytest.raises(ConfigError, match=r"'chat' and 'code' have one object, .*/configmaps/caps"):
        ConfigMapActuator(ConfigMapConfig(name="caps"), SPECS)
