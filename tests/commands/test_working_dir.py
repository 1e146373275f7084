"""What `ray job submit --working-dir .` sends: the code, and nothing that jobs and helpers leave in the folder."""

import logging
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One file of everything that the commands of the documents leave in the project's root, and what must stay here.
LEFT = (
    ".env", ".env.local", ".venv/lib/site.py", ".venv/setup.log", "outputs/first/model/model.safetensors",
    "outputs/quickstart/ray_token", "stores/mine/zarr.json", "models/released/config.json", "run.nii.gz", "run.nii",
    "neurostorm.ckpt", "job.log", "neurostorm-77.log", "slurm-77.out", "mlruns/0/meta.yaml", "mlartifacts/0/model.bin",
    "mlflow.db", "mlflow.db-wal", "mlflow.sql", "prometheus-3.5.0.linux-amd64.tar.gz",
    "prometheus-3.5.0.linux-amd64/prometheus", "data/wal/00000000",
)  # fmt: skip
CODE = (
    "jobs/pretrain.py",
    "neurostorm/data/plan.py",
    "tools/setup.sh",
    "pyproject.toml",
    "reaction_time.py",
    "labels.tsv",
)


@pytest.mark.parametrize("reads_gitignore", [True, False], ids=["with .gitignore", "without .gitignore"])
def test_code_is_sent_and_what_helpers_leave_is_not(reads_gitignore: bool, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package  # what the job client packs with

    project = tmp_path / "project"
    project.mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, project / name)
    for name in (*LEFT, *CODE):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=reads_gitignore, logger=logging.getLogger(__name__))
    sent = {name for name in ZipFile(package).namelist() if not name.endswith("/")}
    assert sent == {*CODE, ".gitignore", ".rayignore"}
