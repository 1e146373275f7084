"""The Kubernetes files: KubeRay's schemas, security settings, and where secrets come from.

kuberay-*.yaml, mlflow.yaml  ->  schema of each object, our own rules  ->  a spoilt copy is refused
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = {"kuberay-rayjob.yaml": "RayJob", "kuberay-raycluster.yaml": "RayCluster"}
NAMES = (*KUBERAY, "mlflow.yaml")
Objects = list[dict[str, Any]]
Validator = jsonschema.Draft202012Validator


def objects(name: str) -> Objects:
    """The Kubernetes objects of a file."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(items: Objects, kind: str) -> dict[str, Any]:
    (found,) = [item for item in items if item["kind"] == kind]
    return found


def ray_cluster(name: str) -> dict[str, Any]:
    """The specification of the Ray cluster of a KubeRay file."""
    spec: dict[str, Any] = of_kind(objects(name), KUBERAY[name])["spec"]
    return spec["rayClusterSpec"] if KUBERAY[name] == "RayJob" else spec


def templates(items: Objects) -> Iterator[dict[str, Any]]:
    """The pod templates of a file: a Ray cluster's head and groups, a Deployment's, a StatefulSet's."""
    for item in items:
        spec = item["spec"].get("rayClusterSpec", item["spec"])
        if "headGroupSpec" in spec:
            yield from (group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
        elif "template" in spec:
            yield spec["template"]


# Schemas: KubeRay's definition of a RayCluster holds those of pods, Services, claims and rules of a policy as well.


@pytest.fixture(scope="module")
def schemas() -> dict[str, Validator]:
    """A validator for each kind of object in these files."""
    folder = ROOT.parent / "shared" / "schemas"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    job, cluster = (json.loads((folder / f"kuberay_{kind}_v1.json").read_text()) for kind in ("rayjob", "raycluster"))
    head = cluster["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]
    pod = head["template"]["properties"]["spec"]["properties"]
    claim = pod["volumes"]["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"][
        "spec"
    ]
    rules = cluster["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]["properties"]
    selector = rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"]["podSelector"]
    workload = {"replicas": {"type": "integer"}, "selector": selector, "template": head["template"]}
    claims = {"type": "array", "items": closed({"metadata": {"type": "object"}, "spec": claim}, "spec")}
    sides = {"type": "array", "items": {"enum": ["Ingress", "Egress"]}, "minItems": 1}
    policy = {"podSelector": selector, "policyTypes": sides, "ingress": rules["ingressRules"]}
    specs = {
        "PersistentVolumeClaim": claim,
        "Service": head["headService"]["properties"]["spec"],
        "Deployment": closed({**workload, "strategy": {"type": "object"}}, "selector", "template"),
        "StatefulSet": closed(
            {**workload, "serviceName": {"type": "string"}, "volumeClaimTemplates": claims},
            "selector", "template", "serviceName",
        ),
        "NetworkPolicy": closed({**policy, "egress": rules["egressRules"]}, "podSelector", "policyTypes"),
    }  # fmt: skip
    around = {name: {"type": "string"} for name in ("apiVersion", "kind")} | {"metadata": {"type": "object"}}
    built = {kind: closed({**around, "spec": spec}, *around, "spec") for kind, spec in specs.items()}
    return {kind: Validator(schema) for kind, schema in {**built, "RayJob": job, "RayCluster": cluster}.items()}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The schema of an object that has no other properties."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_accepts_every_object(name: str, schemas: dict[str, Validator]) -> None:
    for item in objects(name):
        schemas[item["kind"]].validate(item)


def misspelt(item: dict[str, Any]) -> None:
    spec = item["spec"].get("rayClusterSpec", item["spec"])
    key = next(iter(spec))
    spec[f"{key}s"] = spec.pop(key)


def wrong_type(item: dict[str, Any]) -> None:
    spec = item["spec"].get("rayClusterSpec", item["spec"])
    for path in (
        ("headGroupSpec", "rayStartParams", "num-cpus"), ("template", "spec", "containers"), ("ports",),
        ("accessModes",), ("podSelector", "matchLabels"),
    ):  # fmt: skip
        node = spec
        for key in path[:-1]:
            node = node.get(key, {})
        if path[-1] in node:
            node[path[-1]] = 0
            return
    raise AssertionError(f"nothing to spoil in {item}")


@pytest.mark.parametrize("spoil", [misspelt, wrong_type])
@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_refuses_spoilt_objects(
    name: str, spoil: Callable[[dict[str, Any]], None], schemas: dict[str, Validator]
) -> None:
    for item in objects(name):
        spoil(item)
        with pytest.raises(jsonschema.ValidationError):
            schemas[item["kind"]].validate(item)


# Security settings


def security_problems(items: Objects) -> list[str]:
    """Pods that may be root, gain rights, take a node's memory, or get a secret from anywhere but a Secret."""
    problems = []
    for template in templates(items):
        pod = template["spec"]
        if pod.get("securityContext", {}).get("runAsNonRoot") is not True:
            problems.append("a pod may be root")
        for container in pod["containers"]:
            context, limits = container.get("securityContext", {}), container.get("resources", {}).get("limits", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
                problems.append(f"{container['name']} may gain rights")
            problems += [f"{container['name']}: no limit of {what}" for what in ("cpu", "memory") if what not in limits]
            for entry in container.get("env", []):
                secret = re.search(r"PASSWORD|SECRET|TOKEN|KEY", entry["name"])
                if secret and list(entry.get("valueFrom", {})) != ["secretKeyRef"]:
                    problems.append(f"{entry['name']} does not come from a Secret")
    for item in items:
        spec = item["spec"].get("rayClusterSpec", item["spec"])
        if "headGroupSpec" in spec and spec.get("authOptions") != {"mode": "token"}:
            problems.append("Ray asks for no token")
        if "ClusterIP" not in (spec.get("type", "ClusterIP"), spec.get("headGroupSpec", {}).get("serviceType")):
            problems.append("a Service is reachable from outside")
        if "headGroupSpec" in spec and spec["headGroupSpec"].get("serviceType") != "ClusterIP":
            problems.append("the head's Service is reachable from outside")
    return problems


@pytest.mark.parametrize("name", NAMES)
def test_pods_run_without_root_within_limits_and_ray_asks_for_a_token(name: str) -> None:
    assert security_problems(objects(name)) == []


@pytest.mark.parametrize(
    ("name", "found", "spoilt"),
    [
        *((name, "runAsNonRoot: true", "runAsNonRoot: false") for name in NAMES),
        *((name, "capabilities: {drop: [ALL]}", "capabilities: {}") for name in NAMES),
        *((name, "limits: {cpu:", "limits: {cpus:") for name in NAMES),
        *((name, "mode: token", "mode: disabled") for name in KUBERAY),
        *((name, "serviceType: ClusterIP", "serviceType: NodePort") for name in KUBERAY),
        ("mlflow.yaml", "type: ClusterIP", "type: LoadBalancer"),
        ("mlflow.yaml", "valueFrom: {secretKeyRef: {name: mlflow, key: postgres-password}}", "value: hunter2"),
    ],
)
def test_a_spoilt_security_setting_is_noticed(name: str, found: str, spoilt: str) -> None:
    text = (CLUSTER / name).read_text()
    assert found in text
    assert security_problems(list(yaml.safe_load_all(text.replace(found, spoilt))))


# What belongs together


@pytest.mark.parametrize("name", KUBERAY)
def test_data_is_kept_in_a_volume_that_outlives_the_pods_and_that_all_share(name: str) -> None:
    items = objects(name)
    claim = of_kind(items, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in templates(items):
        (volume,) = template["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = template["spec"]["containers"][0]["volumeMounts"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], "/mnt/neurostorm")


def test_both_kuberay_files_have_one_volume_and_one_image() -> None:
    claims = [of_kind(objects(name), "PersistentVolumeClaim") for name in KUBERAY]
    assert claims[0] == claims[1]
    pods = [template["spec"] for name in KUBERAY for template in templates(objects(name))]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1


def test_rayjob_has_one_gpu_per_worker_and_a_plain_command_on_the_shared_volume() -> None:
    spec = of_kind(objects("kuberay-rayjob.yaml"), "RayJob")["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == int(spec["entrypoint"].split("--workers ")[1].split()[0])
    assert not set("\"'`$&|;<>\n") & set(spec["entrypoint"])  # the operator hands it to a shell as it is
    assert all(f"{option} /mnt/neurostorm/" in spec["entrypoint"] for option in ("--store", "--output"))


@pytest.mark.parametrize("name", KUBERAY)
def test_a_head_has_no_cores_and_a_fixed_number_of_gpu_pods(name: str) -> None:
    spec = ray_cluster(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


def test_mlflow_is_reached_by_the_names_that_it_allows() -> None:
    items = objects("mlflow.yaml")
    services = {item["metadata"]["name"]: item["spec"] for item in items if item["kind"] == "Service"}
    for service in services.values():  # each leads to pods of exactly one workload, at a port that these name
        (pod,) = [t for t in templates(items) if service["selector"].items() <= t["metadata"]["labels"].items()]
        names = [port["name"] for port in pod["spec"]["containers"][0]["ports"]]
        assert [port["targetPort"] for port in service["ports"]] == names
    (container,) = of_kind(items, "Deployment")["spec"]["template"]["spec"]["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    (port,) = services["mlflow"]["ports"]
    assert options["port"] == str(port["port"]) == str(container["ports"][0]["containerPort"])
    allowed = set(options["allowed-hosts"].split(","))
    readme = (CLUSTER / "README.md").read_text()
    assert allowed == {f"{host}:{port['port']}" for host in ("mlflow", "localhost", "127.0.0.1")}
    assert f"--tracking.uri http://mlflow:{port['port']}" in readme  # what the jobs are told is one of them
    assert f"@mlflow-postgres:{services['mlflow-postgres']['ports'][0]['port']}/" in options["backend-store-uri"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_the_readme_makes_the_secret_that_mlflow_reads() -> None:
    references = [
        entry["valueFrom"]["secretKeyRef"]
        for template in templates(objects("mlflow.yaml"))
        for entry in template["spec"]["containers"][0]["env"]
        if "valueFrom" in entry
    ]
    command = re.search(r"kubectl create secret generic (\S+)((?:.*\\\n)*.*)", (CLUSTER / "README.md").read_text())
    assert command
    assert {reference["name"] for reference in references} == {command[1]}
    made = dict(re.findall(r'--from-literal=([\w-]+)=("[^"]*"|\S+)', command[2]))
    assert made.keys() == {reference["key"] for reference in references}
    assert all(value.startswith('"$') for value in made.values())  # from the shell, so that none is in the file
    assert made["postgres-password"].startswith('"$(openssl rand')
