"""Paths of the API server, made of names that objects give.

This module must not know what is asked there.
"""

from __future__ import annotations

import re

from autoscaler.actuators.kube_api import KubeError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")


def path_of(group_version: str, namespace: str, plural: str, *names: str) -> str:
    """Where the objects of a kind in a namespace are, or one of them: of names that objects give, not of paths.

    Raises:
        KubeError: for a name that is more than a name in a path, such as ``../pods`` or ``x?watch=true``.

    >>> path_of("apps/v1", "default", "deployments", "chat")
    '/apis/apps/v1/namespaces/default/deployments/chat'
    """
    segments = (namespace, plural, *names)
    for one in segments:
        if not _NAME.fullmatch(one):
            raise KubeError(0, f"no name of an object: {one[:100]!a}")
    root = "/apis" if "/" in group_version else "/api"
    return f"{root}/{group_version}/namespaces/{'/'.join(segments)}"
