"""The files of cluster/ meet what will read them: Ray's validator, KubeRay's schema, bash, and our own rules.

cluster/*  ->  a checker that lists what is wrong  ->  nothing for the file, something for a spoilt copy of it
"""

import copy
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from neurostorm.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
LAUNCHERS = ("aws.yaml", "onprem.yaml")
RAY_VERSION = importlib.metadata.version("ray")


def launcher(name: str) -> dict[str, Any]:
    """A launcher file as Ray's launcher reads it."""
    config: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return config


def kubernetes() -> dict[str, Any]:
    """The Kubernetes objects of kuberay-rayjob.yaml by their kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((CLUSTER / "kuberay-rayjob.yaml").read_text())}


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specifications of a RayJob: the head's, then each worker group's."""
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def dockerfile(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


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


@pytest.mark.parametrize("spoil", [wrong_head_type, too_many_workers, unknown_key])
def test_ray_refuses_a_spoilt_launcher_file(spoil: Callable[[dict[str, Any]], None]) -> None:
    config = launcher("aws.yaml")
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


def test_aws_gpu_nodes_are_spot_and_hold_a_worker_of_the_base_preset() -> None:
    node = launcher("aws.yaml")["available_node_types"]["gpu_worker"]
    scale = PRESETS["base"]["scale"]
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert node["resources"]["GPU"] >= scale["gpus_per_worker"]
    assert node["resources"]["CPU"] > scale["cpus_per_worker"]  # cores must be left over to read clips
    assert node["max_workers"] >= scale["workers"]


# KubeRay


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    """KubeRay's own schema of a RayJob."""
    path = ROOT.parent / "shared" / "schemas" / "kuberay_rayjob_v1.json"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    schema: dict[str, Any] = json.loads(path.read_text())
    return schema


def test_kuberay_accepts_the_rayjob(rayjob_schema: dict[str, Any]) -> None:
    jsonschema.validate(kubernetes()["RayJob"], rayjob_schema)


def test_kuberay_refuses_a_spoilt_rayjob(rayjob_schema: dict[str, Any]) -> None:
    misspelt = copy.deepcopy(kubernetes()["RayJob"])
    misspelt["spec"]["rayClusterSpec"]["authOption"] = misspelt["spec"]["rayClusterSpec"].pop("authOptions")
    wrong_type = copy.deepcopy(kubernetes()["RayJob"])
    wrong_type["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    for job in (misspelt, wrong_type):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(job, rayjob_schema)


def test_rayjob_keeps_its_data_in_a_volume_that_outlives_it_and_all_pods_share() -> None:
    objects = kubernetes()
    claim = objects["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(objects["RayJob"]):
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert mount["name"] == volume["name"]
        for option in ("--store", "--output"):
            assert f"{option} {mount['mountPath']}/" in objects["RayJob"]["spec"]["entrypoint"]


def test_rayjob_asks_for_a_token_and_runs_without_root() -> None:
    job = kubernetes()["RayJob"]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_rayjob_has_one_gpu_per_worker_and_a_plain_command() -> None:
    spec = kubernetes()["RayJob"]["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] * gpus == int(spec["entrypoint"].split("--workers ")[1].split()[0])
    assert not set("\"'`$&|;<>\n") & set(spec["entrypoint"])  # the operator hands it to a shell as it is


# The image


def test_dockerfile_is_cuda_python_3_11_without_root() -> None:
    instructions = dockerfile((CLUSTER / "Dockerfile").read_text())
    assert [arguments for name, arguments in instructions if name == "FROM"] == [
        f"rayproject/ray:{RAY_VERSION}-py311-gpu"
    ]
    last_user = [arguments for name, arguments in instructions if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:\d+", last_user), "a number, so that Kubernetes can check that it is not root"
    assert any("sys.version_info[:2] == (3, 11)" in arguments for name, arguments in instructions if name == "RUN")


def test_dockerfile_copies_named_files_that_exist_and_no_secret() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    for name, arguments in dockerfile(text):
        if name in ("COPY", "ADD"):
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() and source not in (".", "./") for source in sources), arguments
    assert "RAY_AUTH_TOKEN" not in text


def test_dockerfile_sets_the_environment_of_env_sh() -> None:
    exported = dict(re.findall(r"^export (\w+)=(\S+)", (CLUSTER / "env.sh").read_text(), re.MULTILINE))
    (baked,) = [arguments for name, arguments in dockerfile((CLUSTER / "Dockerfile").read_text()) if name == "ENV"]
    assert dict(pair.split("=") for pair in baked.split()) == exported
    assert exported["RAY_AUTH_MODE"] == "token"


# Rules for all files


def edit_problems(text: str) -> list[str]:
    """What is wrong with the `EDIT n/N` marks of a file: numbered 1 to N in order, N at most five."""
    marks = [(int(n), int(total)) for n, total in re.findall(r"# EDIT (\d+)/(\d+): ", text)]
    problems = [f"{len(marks)} places to edit"] if len(marks) > 5 else []
    if marks != [(n, len(marks)) for n in range(1, len(marks) + 1)]:
        problems.append(f"marks out of order: {marks}")
    return problems


def exposure_problems(text: str) -> list[str]:
    """Addresses that listen to everyone, and secrets, in a file."""
    problems = [f"listens everywhere: {hit}" for hit in re.findall(r"\S*0\.0\.0\.0\S*|host[= ]['\"]?::\S*", text)]
    problems += re.findall(r"RAY_AUTH_MODE=disabled|RAY_AUTH_TOKEN=\S+|(?:AKIA|ASIA)[0-9A-Z]{16}", text)
    problems += re.findall(r"\b[0-9a-f]{64}\b|BEGIN [A-Z ]*PRIVATE KEY", text)
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
    ):
        assert exposure_problems(spoilt), spoilt


def test_one_version_of_ray_everywhere() -> None:
    found = {
        (path.name, version)
        for path in FILES
        for version in re.findall(
            r"(?:rayproject/ray:|rayVersion: \"|ray\.__version__ == '|Ray is )(\d[\d.]*\d)", path.read_text()
        )
    }
    assert {name for name, _ in found} == {"aws.yaml", "kuberay-rayjob.yaml", "Dockerfile", "README.md"}
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
