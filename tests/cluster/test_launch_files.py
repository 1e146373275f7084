"""The files of cluster/ meet what will read them: Ray's validator, Google's API, bash, and our own rules.

cluster/*  ->  a checker that lists what is wrong  ->  nothing for the file, something for a spoilt copy of it
"""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import googleapiclient.discovery_cache
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from neurostorm.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
CLOUDS = ("aws.yaml", "gcp.yaml")
LAUNCHERS = (*CLOUDS, "onprem.yaml")
RAY_VERSION = importlib.metadata.version("ray")


def launcher(name: str) -> dict[str, Any]:
    """A launcher file as Ray's launcher reads it."""
    config: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return config


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a validator wants the network: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)


# Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launcher_file_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    validate_config(prepare_config(launcher(name)))


def wrong_head_type(config: dict[str, Any]) -> None:
    config["head_node_type"] = "no_such_type"


def too_many_workers(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu_worker"]["min_workers"] = config["max_workers"] + 1


def unknown_key(config: dict[str, Any]) -> None:
    config["file_mount"] = {}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("spoil", [wrong_head_type, too_many_workers, unknown_key])
def test_ray_refuses_a_spoilt_launcher_file(spoil: Callable[[dict[str, Any]], None], name: str) -> None:
    config = launcher(name)
    spoil(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_everything_that_a_launcher_copies_exists(name: str) -> None:
    mounts = launcher(name)["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"  # the user's own token, made before `ray up`
    missing = [local for local in mounts.values() if not local.startswith("~") and not (ROOT / local).is_file()]
    assert not missing


def test_every_on_prem_host_joins() -> None:
    prepared = prepare_config(launcher("onprem.yaml"))
    hosts = prepared["provider"]["worker_ips"]
    assert prepared["provider"]["head_ip"] not in hosts
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(hosts)
    assert any("RAY_enable_autoscaler_v2=0" in command for command in prepared["head_start_ray_commands"])


def is_spot(node_config: dict[str, Any]) -> bool:
    """Whether a node can be taken back, and costs less for it; in the words of either cloud."""
    google = node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"
    return google or node_config.get("InstanceMarketOptions") == {"MarketType": "spot"}


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_nodes_are_spot_and_hold_a_worker_of_the_base_preset_and_the_head_stays(name: str) -> None:
    types = launcher(name)["available_node_types"]
    node, scale = types["gpu_worker"], PRESETS["base"]["scale"]
    assert is_spot(node["node_config"])
    assert not is_spot(types["head"]["node_config"])
    assert types["head"]["resources"]["CPU"] == 0
    assert node["resources"]["GPU"] >= scale["gpus_per_worker"]
    assert node["resources"]["CPU"] > scale["cpus_per_worker"]  # cores must be left over to read clips
    assert node["max_workers"] >= scale["workers"]


# Google's Compute Engine, whose API's own description comes with its client; Ray hands node_config on unread.


@pytest.fixture(scope="module")
def compute_api() -> dict[str, Any]:
    """The schemas of the Compute Engine API by name."""
    path = Path(googleapiclient.discovery_cache.__file__).parent / "documents" / "compute.v1.json"
    schemas: dict[str, Any] = json.loads(path.read_text())["schemas"]
    return schemas


def api_problems(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> list[str]:
    """What of `value` the API does not know, or knows as another type."""
    if "$ref" in schema:
        return api_problems(value, schemas[schema["$ref"]], schemas, where)
    if schema["type"] == "array" and isinstance(value, list):
        return [
            p for n, item in enumerate(value) for p in api_problems(item, schema["items"], schemas, f"{where}[{n}]")
        ]
    if schema["type"] == "object" and isinstance(value, dict):
        known = schema.get("properties", {})
        problems = [f"{where}.{name} is unknown" for name in value if name not in known]
        for name in value.keys() & known.keys():
            problems += api_problems(value[name], known[name], schemas, f"{where}.{name}")
        return problems
    types = {"string": str, "boolean": bool, "integer": int}
    if not isinstance(value, types.get(schema["type"], type(None))):
        return [f"{where} is no {schema['type']}: {value!r}"]
    return [f"{where} is none of {schema['enum']}"] if value not in schema.get("enum", [value]) else []


def test_google_knows_every_field_of_its_machines(compute_api: dict[str, Any]) -> None:
    config = launcher("gcp.yaml")
    for name, node in config["available_node_types"].items():
        assert api_problems(node["node_config"], {"$ref": "Instance"}, compute_api, name) == []
        for disk in node["node_config"]["disks"]:
            assert disk["initializeParams"]["diskType"].split("/")[1] == config["provider"]["availability_zone"]
    assert node["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE"  # else no machine with a GPU starts


def test_google_refuses_a_spoilt_machine(compute_api: dict[str, Any]) -> None:
    for field, value in (
        ("scheduling", [{"preemptible": True}]),  # as in Ray's own examples
        ("scheduling", {"provisioningModel": "CHEAP"}),
        ("scheduling", {"automaticRestart": "no"}),
        ("disks", [{"initializeParams": {"diskSizeGb": 200}}]),
        ("machine_type", "g2-standard-16"),
    ):
        node = {**launcher("gcp.yaml")["available_node_types"]["gpu_worker"]["node_config"], field: value}
        assert api_problems(node, {"$ref": "Instance"}, compute_api, "node"), (field, value)


# Rules for all files


def edit_problems(text: str) -> list[str]:
    """What is wrong with the `EDIT n/N` marks of a file: numbered 1 to N in order, N at most five."""
    marks = [(int(n), int(total)) for n, total in re.findall(r"# EDIT (\d+)/(\d+): ", text)]
    problems = [f"{len(marks)} places to edit"] if len(marks) > 5 else []
    if marks != [(n, len(marks)) for n in range(1, len(marks) + 1)]:
        problems.append(f"marks out of order: {marks}")
    return problems


def outside_policies(text: str) -> str:
    """A Kubernetes file without `--host=0.0.0.0` of pods to which its NetworkPolicy admits named pods alone.

    A server in a pod has no other way to listen to its Service and to a port-forward, which comes to its loopback.
    """
    if "kind: NetworkPolicy" not in text:
        return text
    objects = list(yaml.safe_load_all(text))
    closed = [
        item["spec"]["podSelector"]["matchLabels"].items()
        for item in objects
        if item["kind"] == "NetworkPolicy" and "Ingress" in item["spec"]["policyTypes"]
        if all(rule.get("from") for rule in item["spec"]["ingress"])
    ]
    for item in objects:
        template = item["spec"].get("template", {})
        labels = template.get("metadata", {}).get("labels", {}).items()
        if any(selector and selector <= labels for selector in closed):
            text = text.replace("- --host=0.0.0.0\n", "", str(template).count("--host=0.0.0.0"))
    return text


def exposure_problems(text: str) -> list[str]:
    """Addresses that listen to everyone, and secrets, in a file."""
    text = outside_policies(text)
    problems = [f"listens everywhere: {hit}" for hit in re.findall(r"\S*0\.0\.0\.0\S*|host[= ]['\"]?::\S*", text)]
    problems += re.findall(r"RAY_AUTH_MODE=disabled|RAY_AUTH_TOKEN=\S+|(?:AKIA|ASIA)[0-9A-Z]{16}", text)
    problems += re.findall(r"\b[0-9a-f]{64}\b|BEGIN [A-Z ]*PRIVATE KEY", text)
    problems += re.findall(
        r"://[^/\s:@]+:[^/\s@]+@|kind: Secret\b|type: (?:NodePort|LoadBalancer)|kind: Ingress\b", text
    )
    problems += re.findall(r"name: \w*(?:PASSWORD|SECRET|TOKEN|KEY)\w*, value: \S+", text)
    starts = re.findall(r"ray start --head\b|symmetric-run --address", text)
    if starts and len(re.findall(r"--dashboard-host[= ]127\.0\.0\.1", text)) < len(starts):
        problems.append("a head starts without --dashboard-host 127.0.0.1")
    return problems


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".md"], ids=lambda path: path.name)
def test_a_file_has_at_most_five_places_to_edit(path: Path) -> None:
    assert edit_problems(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_listens_to_everyone_and_no_secret_is_in_a_file(path: Path) -> None:
    assert exposure_problems(path.read_text()) == []


def test_the_checkers_find_spoilt_files() -> None:
    assert edit_problems("# EDIT 1/2: a\n# EDIT 3/3: b\n")
    assert edit_problems("".join(f"# EDIT {n}/6: a\n" for n in range(1, 7)))
    head = "ray start --head --dashboard-host=127.0.0.1"
    assert exposure_problems(head) == []
    for spoilt in (
        head.replace("127.0.0.1", "0.0.0.0"),
        head.replace("--dashboard-host=127.0.0.1", ""),
        f"{head}\nmlflow server --host 0.0.0.0",
        f"export RAY_AUTH_TOKEN={'a' * 64}; {head}",
        f"export RAY_AUTH_MODE=disabled; {head}",
        "--backend-store-uri=postgresql://mlflow:hunter2@mlflow-postgres/mlflow",
        "- {name: POSTGRES_PASSWORD, value: hunter2}",
        "apiVersion: v1\nkind: Secret\n",
        "spec:\n  type: LoadBalancer\n",
    ):
        assert exposure_problems(spoilt), spoilt
    guarded = (CLUSTER / "mlflow.yaml").read_text()
    assert exposure_problems(guarded) == []
    ray_pods = "\n        - podSelector:\n            matchLabels: {app.kubernetes.io/part-of: neurostorm}\n"
    for found, spoilt in (
        ("component: server}\n  policyTypes", "component: servers}\n  policyTypes"),
        ("policyTypes: [Ingress]", "policyTypes: [Egress]"),
        (ray_pods, " []\n"),
    ):
        assert found in guarded and "0.0.0.0" in str(exposure_problems(guarded.replace(found, spoilt))), spoilt


def test_one_version_of_ray_everywhere() -> None:
    found = {
        (path.name, version)
        for path in FILES
        for version in re.findall(
            r"(?:rayproject/ray:|rayVersion: \"|ray\.__version__ == '|Ray is )(\d[\d.]*\d)", path.read_text()
        )
    }
    kuberay = {"kuberay-rayjob.yaml", "kuberay-raycluster.yaml"}
    assert {name for name, _ in found} == {*CLOUDS, *kuberay, "Dockerfile", "README.md"}
    assert {version for _, version in found} == {RAY_VERSION}
    assert f"ray=={RAY_VERSION}" in (ROOT / "tools" / "constraints.txt").read_text().split()


def shell_problems(text: str) -> str:
    """What bash says about a script's syntax; nothing when it is sound."""
    return subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr


def test_all_shell_is_sound() -> None:
    scripts = [path.read_text() for path in FILES if path.suffix == ".sh"]
    assert scripts
    for name in LAUNCHERS:
        scripts += [command for key, value in launcher(name).items() if key.endswith("_commands") for command in value]
    assert [(script, problem) for script in scripts if (problem := shell_problems(script))] == []
    assert shell_problems("if true; then echo 'a")


def test_the_readme_names_every_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    assert [path.name for path in FILES if path.name != "README.md" and f"({path.name})" not in text] == []
