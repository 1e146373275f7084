"""The documents are executed: every block of README.md, and what one machine can of cluster/README.md, as it stands.

Blocks run in order in a copy of the project, see documents.py; each is a test of its own. Only what a machine without a
GPU, a cluster or the network cannot do is marked in the document, and then its command lines are read by the real
programs.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import click
import pytest
import yaml

from tests.cluster.test_commands import commands, load
from tests.documents import ROOT, Block, Project, read_blocks, simple_commands

DOCUMENTS = ("README.md", "cluster/README.md")
BLOCKS = [block for name in DOCUMENTS for block in read_blocks((ROOT / name).read_text(), name)]
CODE = [block for block in BLOCKS if block.language in ("bash", "python")]
SHELL_NOT_RUN = [block for block in CODE if block.language == "bash" and block.not_run]

# What makes a script small, behind what the document gives it.
OPTIONS = {
    "jobs/pretrain.py": "--preset tiny --workers 1 --train.max_steps 4 --train.validate_every 4 --data.val_clips 4",
    "jobs/embed.py": "--workers 1",
    "jobs/sweep.py": "--tasks age --methods linear,fc --replicates 1",
    "tools/store.py remove": "--yes",  # it asks at a terminal alone
}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project beside a cohort of twelve people, with the documents' examples led to it."""
    from tests.downstream.embed.test_pretrained import released

    folder = tmp_path_factory.mktemp("documents")
    cohort = folder / "derivatives"
    subprocess.run(
        [sys.executable, "tools/make_cohort.py", str(cohort), "--subjects", "12", "--frames", "24"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    subjects = sorted(path.name for path in cohort.glob("sub-*") if path.is_dir())
    bold = next((cohort / subjects[0]).rglob("*task-rest*_desc-preproc_bold.nii.gz"))
    made = Project(
        folder / "project",
        words={
            "/path/to/derivatives": str(cohort),
            "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz": str(bold),
            "outputs/quickstart": "outputs",
            "sub-0042": subjects[-1],
            "sub-0001": subjects[0],
            "--port 5000": f"--port {free_port()}",
            "10.0.0.10": "127.0.0.1",
            "--source /mnt/neurostorm/derivatives": f"--grid 4mm --source {cohort}",
            "/mnt/neurostorm": str(folder / "shared"),
        },
        options=OPTIONS,
    )
    (folder / "shared" / "outputs").mkdir(parents=True)
    rows = [f"{subject}\t{300 + 10 * number}" for number, subject in enumerate(subjects)]
    (made.folder / "behaviour.tsv").write_text("\n".join(["participant_id\trt_ms", *rows, ""]))
    released(made.folder / "neurostorm.ckpt")
    return made


# What the blocks are


def test_every_block_says_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in ("bash", "python", "yaml", "text")] == []


@pytest.mark.filterwarnings("ignore")  # of Ray and MLflow while they are imported
@pytest.mark.parametrize("block", SHELL_NOT_RUN, ids=str)
def test_a_block_that_is_not_run_has_command_lines_that_its_programs_take(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for job, arguments in commands(block.text.replace("\\\n", " ")):
        load(job, arguments)
    for words in simple_commands(block.text):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Reads a command line with the command line of its program, where that is a script of ours, Ray's or MLflow's."""
    program, *arguments = words
    if program.endswith(".sh") and (ROOT / program).exists():
        assert subprocess.run(["bash", program, "--help"], cwd=ROOT, capture_output=True, check=True).stdout
    elif program in ("ray", "mlflow"):
        modules = {"ray": "ray.scripts.scripts", "mlflow": "mlflow.cli"}
        read_with_click(import_module(modules[program]).cli, program, arguments)


def read_with_click(command: click.Command, name: str, arguments: list[str]) -> None:
    """Reads the options of a command and its subcommand; a click.UsageError says what it does not take."""
    context = command.make_context(name, list(arguments))
    if isinstance(command, click.Group):
        below, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None and below is not None
        read_with_click(found, below, rest)


@pytest.mark.parametrize(
    "line", ["ray up cluster/aws.yaml --bogus", "ray job stop", "ray metrics launch", "mlflow serve"]
)
def test_a_command_line_that_its_program_refuses_is_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_command(line.split())


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_a_yaml_block_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)


# How they are read

EXAMPLE = """# Title
```bash
cd here  # the reader's
```
<!-- not run: needs a GPU -->
```bash
python x.py \\
    --workers 4 > log && echo "a; b"
```
Text.
```text
not code
```
## Section
<!-- not run in this section: needs a cluster -->
  ```bash
  ray up
  ```
### Below
```bash
# Title in a block
```
## Next

<!-- file: a.py -->

```python
class A: ...
```
<!-- runs until stopped -->
```bash
serve --port 1
```
<!-- not run: far -->
Text between.
```bash
runs
```
"""


def test_blocks_are_read_with_their_marks() -> None:
    blocks = read_blocks(EXAMPLE, "a.md")
    found = [(block.line, block.language, block.not_run, block.file, block.serves) for block in blocks]
    assert found == [
        (3, "bash", "", "", False),
        (7, "bash", "needs a GPU", "", False),
        (12, "text", "", "", False),
        (17, "bash", "needs a cluster", "", False),
        (21, "bash", "needs a cluster", "", False),
        (28, "python", "", "a.py", False),
        (32, "bash", "", "", True),
        (37, "bash", "", "", False),
    ]
    assert blocks[3].text == "ray up\n"
    assert list(simple_commands(blocks[0].text)) == [["cd", "here"]]
    assert list(simple_commands(blocks[1].text)) == [["python", "x.py", "--workers", "4"], ["echo", "a; b"]]


@pytest.mark.parametrize(
    ("text", "words"), [("```bash\nx\n", "not closed"), ("<!-- not run -->\n```bash\nx\n```\n", "has no reason")]
)
def test_a_broken_block_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.md:[23]: .*{words}"):
        read_blocks(text, "a.md")


# They run


@pytest.fixture(scope="module")
def cluster(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of one node with the token of the project's home, to which the documents' dashboard address leads."""
    gcs, dashboard, client, agent = (free_port() for _ in range(4))  # another Ray here may have the usual ones
    address = f"http://127.0.0.1:{dashboard}"
    start = (
        "export RAY_AUTH_MODE=token RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0\n"
        f"exec ray start --head --block --node-ip-address 127.0.0.1 --port {gcs} --num-cpus 2 "
        f"--dashboard-host 127.0.0.1 --dashboard-port {dashboard} --ray-client-server-port {client} "
        f"--dashboard-agent-listen-port {agent}"
    )
    with project.running(start, "a Ray of one node", address):
        project.words["http://127.0.0.1:8265"] = address
        yield


@pytest.mark.integration
@pytest.mark.parametrize("block", [block for block in CODE if not block.not_run], ids=str)
def test_a_block_runs_as_it_stands(block: Block, project: Project, request: pytest.FixtureRequest) -> None:
    if "ray job" in block.text:
        request.getfixturevalue("cluster")
    if block.serves:
        project.serve(block)
    else:
        project.run(block)
