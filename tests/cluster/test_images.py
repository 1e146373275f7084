"""The images: the targets of the Dockerfile, what is in them, and the version that every file names.

Dockerfile  ->  instructions by target;  cluster/*  ->  images  ->  nothing without a version, no root, no secret
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.iterdir() if path.is_file())
RAY_VERSION = importlib.metadata.version("ray")


def dockerfile(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each target of a Dockerfile, in order."""
    targets: dict[str, list[tuple[str, str]]] = {}
    for name, arguments in dockerfile(text):
        if name == "FROM":
            targets[arguments.split(" AS ")[1]] = []
        targets[list(targets)[-1]].append((name, arguments))
    return targets


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a Kubernetes file."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def test_dockerfile_is_cuda_python_3_11_without_root() -> None:
    targets = stages((CLUSTER / "Dockerfile").read_text())
    assert list(targets) == ["mlflow", "node"]  # the last is what a build without --target makes
    node = targets["node"]
    assert node[0] == ("FROM", f"rayproject/ray:{RAY_VERSION}-py311-gpu AS node")
    assert any("sys.version_info[:2] == (3, 11)" in arguments for name, arguments in node if name == "RUN")
    for instructions in targets.values():
        last_user = [arguments for name, arguments in instructions if name == "USER"][-1]
        assert re.fullmatch(r"[1-9]\d*:\d+", last_user), "a number, so that Kubernetes can check that it is not root"


def test_mlflows_image_has_the_version_of_the_jobs_and_the_drivers_that_mlflow_yaml_asks_for() -> None:
    (install,) = [
        arguments for name, arguments in stages((CLUSTER / "Dockerfile").read_text())["mlflow"] if name == "RUN"
    ]
    (deployment,) = [item for item in documents("mlflow.yaml") if item["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (uri,) = [word for word in container["args"] if word.startswith("--backend-store-uri=")]
    driver = re.fullmatch(r"--backend-store-uri=postgresql\+(\w+)://.*", uri)
    assert driver and f" {driver[1]}-binary==" in install
    assert " boto3 " in install and any(word.startswith("--artifacts-destination=s3://") for word in container["args"])
    version = importlib.metadata.version("mlflow")
    assert f"mlflow.__version__ == '{version}'" in install and container["image"].endswith(f":{version}")
    assert f"mlflow=={version}" in (ROOT / "tools" / "constraints.txt").read_text().split()


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


def image_problems(text: str) -> list[str]:
    """Images without a version, which are another one tomorrow."""
    images = re.findall(r"^\s*(?:- )?image: (?:&\w+ )?([^\s*]\S*)|^FROM (\S+)", text, re.MULTILINE)
    return [image for pair in images for image in pair if image and not re.fullmatch(r".+:v?\d+\.\d[\w.-]*", image)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_have_a_version(path: Path) -> None:
    assert image_problems(path.read_text()) == []


def test_images_without_a_version_are_found() -> None:
    for spoilt in ("  image: postgres\n", "- image: a/b:latest\n", "image: &i postgres:17\n", "FROM python AS a\n"):
        assert image_problems(spoilt), spoilt
