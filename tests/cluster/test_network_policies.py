"""Who may connect to whom under the NetworkPolicies of the Kubernetes files, worked out as Kubernetes does.

policies + labels of two pods + port  ->  admitted or not  ->  as wanted for the file, not for a spoilt copy of it
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml")
Objects = list[dict[str, Any]]
Labels = dict[str, str]


def objects(name: str) -> Objects:
    """The Kubernetes objects of a file."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def pod_labels(items: Objects) -> Iterator[Labels]:
    """The labels of each kind of pod: of a Ray cluster's head and groups, a Deployment's, a StatefulSet's."""
    for item in items:
        spec = item["spec"].get("rayClusterSpec", item["spec"])
        groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"]) if "headGroupSpec" in spec else (spec,)
        yield from (group["template"]["metadata"]["labels"] for group in groups if "template" in group)


def covers(selector: dict[str, Any] | None, labels: Labels) -> bool:
    """Whether a label selector covers these labels; an empty one covers all, a missing one is the caller's matter."""
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def admitted(items: Objects, to: Labels, port: int, by: Labels, namespace: str | None = None) -> bool:
    """What Kubernetes would do with a connection to a pod from another, of the same namespace if that is None."""
    policies = [
        item["spec"] for item in items if item["kind"] == "NetworkPolicy" and covers(item["spec"]["podSelector"], to)
    ]
    policies = [spec for spec in policies if "Ingress" in spec["policyTypes"]]
    return not policies or any(
        (not rule.get("from") or any(is_peer(peer, by, namespace) for peer in rule["from"]))
        and (not rule.get("ports") or any(entry["port"] == port for entry in rule["ports"]))
        for spec in policies
        for rule in spec.get("ingress", [])
    )


def is_peer(peer: dict[str, Any], labels: Labels, namespace: str | None) -> bool:
    if "namespaceSelector" in peer:
        place = covers(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace or "default"})
    else:
        place = namespace is None
    return place and ("podSelector" not in peer or covers(peer["podSelector"], labels))


OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
STRANGER = {"app.kubernetes.io/part-of": "somebody-else"}


def ray_policy_problems(items: Objects) -> list[str]:
    """Connections to the pods of a Ray cluster that should be admitted and are not, or the other way round."""
    (pod, *others) = list(pod_labels(items))
    namespace = next(
        (
            peer["namespaceSelector"].get("matchLabels", {}).get("kubernetes.io/metadata.name", "")
            for item in items if item["kind"] == "NetworkPolicy"
            for rule in item["spec"]["ingress"] for peer in rule.get("from", []) if "namespaceSelector" in peer
        ),
        "",
    )  # fmt: skip
    another = {**pod, "app.kubernetes.io/instance": "another-cluster"}
    wanted = {
        "the cluster itself": (True, 6379, pod, None),
        "the cluster itself, on any port": (True, 41234, pod, None),
        "the operator": (True, 8265, OPERATOR, namespace),
        "the operator, elsewhere": (False, 6379, OPERATOR, namespace),
        "an operator of another namespace": (False, 8265, OPERATOR, "somewhere"),
        "a pod that calls itself operator": (False, 8265, OPERATOR, None),
        "another pod of the operator's namespace": (False, 8265, STRANGER, namespace),
        "another cluster": (False, 8265, another, None),
        "a pod with our labels in another namespace": (False, 6379, pod, "somewhere"),
        "a stranger": (False, 8265, STRANGER, None),
    }
    jobs = [item["metadata"]["name"] for item in items if item["kind"] == "RayJob"]
    for job in jobs:
        wanted["the pod that submits"] = (True, 8265, {"batch.kubernetes.io/job-name": job}, None)
        wanted["the pod that submits, elsewhere"] = (False, 6379, {"batch.kubernetes.io/job-name": job}, None)
    problems = ["pods of one cluster have different labels"] if any(labels != pod for labels in others) else []
    problems += ["Egress is restricted"] if egress_restricted(items, pod) else []
    return problems + [who for who, (want, *how) in wanted.items() if admitted(items, pod, *how) is not want]


def egress_restricted(items: Objects, pod: Labels) -> bool:
    specs = [item["spec"] for item in items if item["kind"] == "NetworkPolicy"]
    return any("Egress" in spec["policyTypes"] for spec in specs if covers(spec["podSelector"], pod))


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_pods_admit_their_cluster_and_the_operator_alone(name: str) -> None:
    assert ray_policy_problems(objects(name)) == []


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    ("found", "spoilt"),
    [
        ("kind: NetworkPolicy", "kind: NetworkPolicies"),
        ("policyTypes: [Ingress]", "policyTypes: [Ingress, Egress]"),
        ("        - podSelector: *this_cluster\n", "        - podSelector: {}\n"),
        ("        - podSelector: *this_cluster\n", "        - namespaceSelector: {}\n"),
        ("    - from:\n        - podSelector: *this_cluster\n", ""),
        ("matchLabels: {kubernetes.io/metadata.name: kuberay-operator}", "matchLabels: {}"),
        ("          podSelector:\n            matchLabels: {app.kubernetes.io/component: kuberay-operator}\n", ""),
        ("      ports:\n        - {protocol: TCP, port: 8265}\n", ""),
        ("metadata: *pod_labels", "metadata: {labels: {app.kubernetes.io/part-of: other}}"),
        (", app.kubernetes.io/instance: neurostorm-", ", other: neurostorm-"),
    ],
)
def test_a_spoilt_policy_is_noticed(name: str, found: str, spoilt: str) -> None:
    text = (CLUSTER / name).read_text()
    assert found in text
    assert ray_policy_problems(list(yaml.safe_load_all(text.replace(found, spoilt))))


def mlflow_policy_problems(items: Objects) -> list[str]:
    """Likewise for MLflow and its database; the pods that may call MLflow are those of the KubeRay files."""
    database, server = pod_labels(items)
    ray = [labels for name in KUBERAY for labels in pod_labels(objects(name))]
    wanted = [
        *(("Ray pod to MLflow", True, server, 5000, labels, None) for labels in ray),
        *(("Ray pod to the database", False, database, 5432, labels, None) for labels in ray),
        ("Ray pod of another namespace", False, server, 5000, ray[0], "somewhere"),
        ("stranger to MLflow", False, server, 5000, STRANGER, None),
        ("stranger to the database", False, database, 5432, STRANGER, None),
        ("MLflow to the database", True, database, 5432, server, None),
        ("MLflow to the database, elsewhere", False, database, 22, server, None),
    ]
    problems = [who for who, want, *how in wanted if admitted(items, *how) is not want]
    problems += ["MLflow cannot reach out"] if egress_restricted(items, server) else []
    return problems + ([] if egress_restricted(items, database) else ["the database can reach out"])


def test_mlflow_admits_ray_pods_alone_and_its_database_mlflow_alone() -> None:
    assert mlflow_policy_problems(objects("mlflow.yaml")) == []
    for number, item in enumerate(objects("mlflow.yaml")):
        if item["kind"] == "NetworkPolicy":
            without = objects("mlflow.yaml")
            del without[number]
            open_to_all = objects("mlflow.yaml")
            del open_to_all[number]["spec"]["ingress"][0]["from"]
            shut = objects("mlflow.yaml")
            shut[number]["spec"]["ingress"] = []
            assert all(mlflow_policy_problems(spoilt) for spoilt in (without, open_to_all, shut))
