"""What is kept of a pod, and why one does not get ready, in the words of scheduler and kubelet."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.actuators.kubernetes_pods import going, groups, read_pod
from autoscaler.actuators.label_selectors import MAX_VALUES, LabelSelector, covering

MADE, CHANGED = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
MADE_S = 1767225600.0


def pod(name: str = "chat-a", labels: dict[str, str] | None = None, **status: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "creationTimestamp": MADE, "labels": labels or {}}
    return {"metadata": metadata, "status": status}


def ready(status: str, **more: str) -> dict[str, str]:
    return {"type": "Ready", "status": status, "lastTransitionTime": CHANGED, **more}


def waiting(reason: str, message: str = "", **last: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, "lastState": last}


@pytest.mark.parametrize(
    ("status", "reason", "since_s"),
    [
        ({}, "", MADE_S),
        ({"conditions": [ready("True")]}, "", MADE_S + 3600),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no\n GPU"}
                ]
            },
            "Unschedulable: no GPU",
            MADE_S,
        ),
        ({"containerStatuses": [waiting("ContainerCreating")]}, "", MADE_S),
        ({"initContainerStatuses": [waiting("ErrImagePull", "not found")]}, "ErrImagePull: not found", MADE_S),
        (
            {
                "conditions": [ready("False", message="containers with unready status: [engine]")],
                "containerStatuses": [
                    waiting("CrashLoopBackOff", "back-off", terminated={"reason": "OOMKilled", "exitCode": 137})
                ],
            },
            "CrashLoopBackOff: back-off, last OOMKilled with exit code 137",
            MADE_S,  # it may have been ready for a moment in each of its crashes
        ),
        (
            {"conditions": [ready("False", message="unready status: [engine]")]},
            "unready status: [engine]",
            MADE_S + 3600,
        ),
    ],
)
def test_a_pod_says_why_it_is_not_ready_and_since_when(status: dict[str, Any], reason: str, since_s: float) -> None:
    read = read_pod(pod(**status))
    assert (read.reason, read.since_s) == (reason, since_s)


def crashed(began: str, over: str) -> dict[str, Any]:
    run = {"reason": "Error", "exitCode": 1, "startedAt": f"2026-01-01T{began}Z", "finishedAt": f"2026-01-01T{over}Z"}
    return waiting("CrashLoopBackOff", terminated=run)


@pytest.mark.parametrize(
    ("began", "over", "since_s"),
    [
        ("00:50:00", "01:00:00", 3600.0),  # it served for ten minutes, until it crashed
        ("01:05:00", "01:05:03", 3600.0),  # it served until an hour ago, and crashes since then
        ("00:59:57", "01:00:00", 0.0),  # it was ready for a moment, as one without a readiness probe is in each crash
    ],
)
def test_a_pod_that_crashes_has_been_starting_since_it_last_served(began: str, over: str, since_s: float) -> None:
    found = read_pod(pod(conditions=[ready("False")], containerStatuses=[crashed(began, over)]))
    assert found.since_s == MADE_S + since_s


def test_control_characters_of_a_message_do_not_reach_a_terminal() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "\x1b[31mred\x07"}
    assert read_pod(pod(conditions=[condition])).reason == "Unschedulable: [31mred"


def test_evicted_and_leaving_pods_are_no_replicas() -> None:
    leaving = pod()
    leaving["metadata"]["deletionTimestamp"] = CHANGED
    found = [read_pod(one).counts for one in (pod(), pod(phase="Failed"), pod(phase="Succeeded"), leaving)]
    assert found == [True, False, False, False]


@pytest.mark.parametrize(
    ("there", "beyond"),
    [
        (["ready"] * 4, 0),
        (["ready"] * 2 + ["loading"] * 2, 0),  # they are on their way
        (["ready"] * 4 + ["loading"] * 4, 4),
        (["ready"] * 4 + ["pending"] * 4, 0),  # a surge that has no GPU
        (["ready"] * 5 + ["leaving"], 2),  # which finishes its requests
        (["leaving"] * 3, 3),
        (["ready"] * 4 + ["evicted"], 0),
    ],
)
def test_beyond_the_target_are_those_that_leave_and_the_surplus_that_has_an_address(
    there: list[str], beyond: int
) -> None:
    def one(what: str) -> dict[str, Any]:
        made = pod(
            phase="Failed" if what == "evicted" else "Running",
            podIP="" if what == "pending" else "10.0.0.1",
            conditions=[ready(str(what == "ready"))],
        )
        made["metadata"] |= {"deletionTimestamp": CHANGED} if what == "leaving" else {}
        return made

    assert going([read_pod(one(what)) for what in there], target=4) == beyond


def member(group: int, worker: int, is_ready: bool) -> Any:
    own = {"group-index": str(group), "worker-index": str(worker)}
    labels = {f"leaderworkerset.sigs.k8s.io/{key}": value for key, value in own.items()}
    return read_pod(pod(f"chat-{group}-{worker}", labels, conditions=[ready(str(is_ready))]))


def test_a_group_is_ready_when_all_its_pods_are_there_and_ready() -> None:
    pods = [
        *(member(0, worker, True) for worker in range(3)),
        *(member(1, worker, worker < 2) for worker in range(3)),
        *(member(2, worker, True) for worker in range(2)),  # one is missing
        member(3, 1, True),  # without a leader there is no replica
    ]
    assert {one.name: one.ready for one in groups(pods, 3)} == {"chat-0-0": True, "chat-1-0": False, "chat-2-0": False}


@pytest.mark.parametrize("text", ["a=b c", "a in x", "=b", "a,,b=("])
def test_what_is_no_selector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no label selector"):
        LabelSelector.parse(text)


def test_a_selector_reads_as_the_server_does() -> None:
    selector = LabelSelector.parse("a=b,c!=d,e in (x, y),f notin (z),g,!h")
    assert selector.matches({"a": "b", "e": "y", "g": ""})
    for wrong in ({"a": "b", "e": "y"}, {"a": "b", "e": "z", "g": ""}, {"a": "b", "e": "x", "g": "", "h": ""}):
        assert not selector.matches(wrong)
    assert LabelSelector.parse(selector.text()) == selector
    expressions = [{"key": "tier", "operator": "NotIn", "values": ["test"]}, {"key": "x", "operator": "DoesNotExist"}]
    of = LabelSelector.of({"matchLabels": {"app": "chat"}, "matchExpressions": expressions})
    assert of == LabelSelector.parse("app=chat,tier notin (test),!x")
    assert not LabelSelector().matches({})  # nothing, rather than everything


def test_few_watches_see_the_pods_of_all_services() -> None:
    helm = [LabelSelector.parse(f"name=vllm,instance={one}") for one in ("chat", "code")]
    plain, odd = LabelSelector.parse("app=other"), LabelSelector.parse("!app")
    texts = covering([*helm, plain, odd, LabelSelector()])
    assert texts == {
        helm[0]: "instance in (chat,code)",
        helm[1]: "instance in (chat,code)",
        plain: "app in (other)",
        odd: "!app",
    }
    many = [LabelSelector.parse(f"app=s{number}") for number in range(MAX_VALUES + 1)]
    assert set(covering(many).values()) == {"app"}
