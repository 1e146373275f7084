"""cluster/SECURITY.md promises nothing without a test, and the code has no other door than those it tells of."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster" / "SECURITY.md").read_text()
CODE = [path for folder in ("neurostorm", "jobs", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
WRITTEN = [
    path
    for folder in ("cluster", "jobs", "tools", "neurostorm")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".md", ".sh", ".py", ".yaml"}
] + [ROOT / "README.md"]
LOOPBACK, PRIVATE = "127.0.0.1", "10.0.0.10"  # the second stands for the head of a cluster
UNPICKLES = re.compile(
    r"pickle\.loads?\(|allow_pickle=True|weights_only=False|yaml\.(?:unsafe_|full_)?load(?:_all)?\(|joblib|read_pickle|dill"
)


ADVICE = re.compile(r"^.*# runs code: only if you trust the file$", re.MULTILINE)  # of a message, which people run


def names(pattern: str, paths: list[Path]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths if re.search(pattern, ADVICE.sub("", path.read_text()))}


def test_every_claim_names_a_test_that_exists() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    claims = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| claim")]
    assert len(claims) > 10
    assert [line for line in claims if not re.search(r"`test_\w+`", line)] == []
    assert set(re.findall(r"`(test_\w+)`", TEXT)) - defined == set()


def test_ray_is_started_by_the_session_alone() -> None:
    assert names(r"\bray\.init\(", CODE) == {"neurostorm/runtime/session.py"}
    launchers = {"cluster/aws.yaml", "cluster/gcp.yaml", "cluster/onprem.yaml"}
    assert names(r"ray\"? start --head", WRITTEN) - launchers == {"tools/quickstart.sh"}
    quickstart = (ROOT / "tools" / "quickstart.sh").read_text()
    before, started = quickstart.split('ray" start --head')
    assert "export RAY_AUTH_MODE=token" in before and "--dashboard-host 127.0.0.1" in started
    assert "export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0" in before, "it would take 30 s to end"


def servers(text: str) -> list[str]:
    """Where each `mlflow server` of a text listens; "" for one that does not say."""
    commands = re.findall(r"mlflow\s+server\s([^`]*?(?:`|\n\s*\n|$))", re.sub(r"\\\n", " ", text))
    return [(re.search(r"--host[= ](\S+)", command) or ["", ""])[1].rstrip('"') for command in commands]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_mlflow_server_says_where_it_listens(path: Path) -> None:
    assert set(servers(path.read_text())) <= {LOOPBACK, PRIVATE}


def test_servers_are_found_in_every_form() -> None:
    text = "x: mlflow server --host 0.0.0.0\n\n`mlflow\nserver --port 1`\nmlflow server \\\n --port 5000 \\\n --host=::"
    assert servers(text) == ["0.0.0.0", "", "::"]
    assert sum(len(servers(path.read_text())) for path in WRITTEN) >= 6


def test_pickle_stays_between_the_workers_of_one_ray() -> None:
    # Both hand objects from a driver to its own workers, in memory of a Ray that asked for the token.
    assert names(UNPICKLES.pattern, CODE) == {"neurostorm/downstream/embed/job.py", "neurostorm/ingest/map_runs.py"}


@pytest.mark.parametrize(
    "line",
    ["pickle.load(file)", "np.load(f, allow_pickle=True)", "torch.load(f, weights_only=False)", "yaml.load(text)",
     "yaml.load_all(text)", "joblib.load(f)", "pd.read_pickle(f)"],
)  # fmt: skip
def test_a_door_would_be_found(line: str) -> None:
    assert UNPICKLES.search(line)
    assert not UNPICKLES.search("yaml.safe_load(text); torch.load(f, weights_only=True); safe_load_all(x)")
