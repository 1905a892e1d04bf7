"""What a policy remembers, as arrays that outlive a restart.

A part has memory if it can be reset. Its memory consists of its arrays and those of its own parts; settings are not
arrays, or they belong to something that cannot be reset (the fleet). So nobody has to list what to save, and nothing is
left out.
This module must not know any policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

State = Mapping[str, npt.NDArray[Any]]
HISTORY = "history"
"""Last word of the name of an array (n, T, ...) whose second axis is as long as the history; its end is the present."""


@runtime_checkable
class Remembering(Protocol):
    """A part with memory."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays with leading axis n."""
        ...

    def restore(self, state: State) -> None:
        """Go on from what `state` returned."""
        ...


class Durable:
    """Gives a policy `state` and `restore`."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All that a restarted policy needs to go on as if nothing had happened: arrays with leading axis n."""
        return state_of(self)

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, for services and pools of the same shape."""
        restore_into(self, state)


def state_of(part: object) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a part and of its parts, by path."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name, value in vars(part).items():
        if isinstance(value, np.ndarray):
            found[name] = value
        elif hasattr(value, "reset"):
            own = value.state() if hasattr(value, "state") else state_of(value)
            found |= {f"{name}.{inner}": array for inner, array in own.items()}
    return found


def restore_into(part: object, state: State) -> None:
    """Put the arrays that `state_of` returned back."""
    for name, value in list(vars(part).items()):
        if isinstance(value, np.ndarray):
            setattr(part, name, np.array(state[name], value.dtype))
        elif hasattr(value, "reset"):
            start = f"{name}."
            own = {path.removeprefix(start): array for path, array in state.items() if path.startswith(start)}
            if hasattr(value, "restore"):
                value.restore(own)
            else:
                restore_into(value, own)


def states_of(policies: Mapping[str, object]) -> dict[str, npt.NDArray[Any]]:
    """What several policies remember, by name and path; a policy without a memory has nothing."""
    return {
        f"{name}.{path}": array
        for name, policy in policies.items()
        if isinstance(policy, Remembering)
        for path, array in policy.state().items()
    }


def restore_each(policies: Mapping[str, object], state: State) -> None:
    """Bring back those policies whose whole memory is in what `states_of` returned."""
    for name, policy in policies.items():
        if isinstance(policy, Remembering):
            start = f"{name}."
            own = {path.removeprefix(start): array for path, array in state.items() if path.startswith(start)}
            if own.keys() == policy.state().keys():
                policy.restore(own)
