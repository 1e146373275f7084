"""The package from outside: lazy imports, the core alone, the command and its subcommands, the wheel, the doctor."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neurostorm
from neurostorm.__main__ import COMMANDS
from neurostorm.commands import doctor
from neurostorm.commands.doctor import NEEDS, Facts, findings, look

ROOT = Path(__file__).resolve().parents[2]
NO_EXTRAS = """
import sys
OTHERS = {"ray", "deepspeed", "mlflow", "nilearn", "sklearn", "pandas", "matplotlib", "tqdm", "ninja", "boto3", "moto"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
CORE = """
import sys
import neurostorm
assert not {"torch", "numpy", "pydantic"} & set(sys.modules), "importing the package loads nothing"
assert "NeuroStorm" in dir(neurostorm)
from neurostorm import Config, FrameStore, NeuroStorm
model = NeuroStorm.from_pretrained(sys.argv[1])
store = FrameStore.open(sys.argv[2])
frames = store.frames(store.runs()[0], 0, 4)
vector = model.embed(store.unpack(store.codec.decode(frames)).transpose(1, 2, 3, 0).copy())
assert vector.isfinite().all() and vector.ndim == 1, vector
"""


def python(*words: object, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **options)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def test_the_core_alone_loads_a_model_and_reads_a_store(tmp_path: Path, ball_store: Path) -> None:
    from neurostorm.model.config import SwinConfig
    from neurostorm.model.encoder import SwinEncoder
    from neurostorm.model.hub.pretrained import save_pretrained

    shape = neurostorm.FrameStore.open(ball_store).grid.shape
    network = SwinEncoder(SwinConfig((*shape, 4), (6, 6, 6, 1), embed_dim=8, depths=(1, 1), heads=(1, 2)))
    save_pretrained(network, tmp_path / "model")
    python("-c", NO_EXTRAS + CORE, tmp_path / "model", ball_store)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NeuroStrom'"):
        _ = neurostorm.NeuroStrom
    assert set(neurostorm.__all__) <= set(dir(neurostorm))
    assert neurostorm.Task.__name__ == "Task" and issubclass(neurostorm.Regression, neurostorm.Task)


def test_the_help_lists_all_commands_and_loads_none_of_them() -> None:
    program = "import sys; from neurostorm.__main__ import main; status = main(); assert not status\n"
    checked = "assert not {'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)"
    shown = python("-c", program + checked).stdout
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert neurostorm.__version__ in python("-m", "neurostorm", "--version").stdout


def test_an_unknown_command_is_answered_with_the_nearest() -> None:
    done = python("-m", "neurostorm", "pretran", check=False)
    assert done.returncode == 2 and "no command 'pretran'; did you mean pretrain?" in done.stderr


def test_hints_and_errors_name_what_was_typed(tmp_path: Path) -> None:
    done = python("-m", "neurostorm", "pretrain", "--train.leaning_rate", "1", check=False)
    assert done.returncode == 2 and done.stderr.startswith("python -m neurostorm pretrain: unknown option")
    assert "See: python -m neurostorm pretrain --help" in done.stderr
    done = python("-m", "neurostorm", "store", "stats", tmp_path / "none", check=False)
    assert done.returncode == 1 and done.stderr.startswith("python -m neurostorm store stats: ")


def test_a_package_that_is_missing_is_named_with_what_to_install() -> None:
    program = "import sys; from neurostorm.__main__ import main; sys.argv = ['neurostorm', 'report', '--run', 'x']\n"
    done = python("-c", NO_EXTRAS + program + "sys.exit(main())", check=False)
    assert done.returncode == 1, done.stderr
    assert "pip install 'neurostorm[all]'" in done.stderr or "No module named" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the package, built from a copy of its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "neurostorm", source / "neurostorm", ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", target)
    (built,) = target.glob("*.whl")
    return built


def test_a_wheel_elsewhere_has_all_that_commands_need(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    wanted = {"py.typed", "README.md", "__main__.py", "model/mixers/scan.c", *(f"commands/{n}.py" for n in NEEDS)}
    assert {f"neurostorm/{name}" for name in wanted} <= names
    assert not any(name.startswith(("tests/", "tools/", "jobs/", "build/")) for name in names)
    (entry_points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "neurostorm = neurostorm.__main__:main" in entry_points.read_text()
    helps = f"""
import sys, contextlib, io
sys.path.insert(0, {str(tmp_path)!r})
import neurostorm
from neurostorm.__main__ import COMMANDS, main
assert neurostorm.__file__.startswith({str(tmp_path)!r})
for name in COMMANDS:
    sys.argv, shown = ["/usr/bin/neurostorm", name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main()
    assert shown.getvalue().startswith(f"usage: neurostorm {{name}} "), shown.getvalue()[:200]
"""
    python("-I", "-c", helps, cwd=tmp_path)


HERE = Facts((3, 11, 7), "Linux", dict.fromkeys({p for packages in NEEDS.values() for p in packages}, "1"), 2, 8.0,
             ("/tmp", 50.0), compiler="/usr/bin/gcc")  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "command", "words"),
    [
        ({"versions": {}}, "embed", "missing: torch"),
        ({"versions": {k: v for k, v in HERE.versions.items() if k != "deepspeed"}}, "pretrain", "missing: deepspeed"),
        ({"python": (3, 9, 1)}, "store", "Python 3.9.1 is too old"),
        ({"compiler": ""}, "", "no C compiler"),
        ({"gpus": ["H100"], "driver": "550.1"}, "", "torch is a build for CPUs"),
        ({"gpus": ["H100"], "driver": "550.1", "torch_cuda": "13.0"}, "", "CUDA 13.0 needs driver 580, there is 550.1"),
        ({"memory_gb": 1.5}, "", "1.5 GB of memory"),
        ({"temporary": ("/tmp", 0.5)}, "", "0.5 GB are free in /tmp"),
    ],
)
def test_the_doctor_names_what_is_missing_for_which_command(changed: dict, command: str, words: str) -> None:
    assert findings(HERE) == []
    found = findings(Facts(**{**vars(HERE), **changed}))
    assert any(each.command == command and words in each.text and each.fix for each in found), found


def test_the_doctor_of_this_machine_says_whether_a_command_can_run(tmp_path: Path, monkeypatch, capsys) -> None:
    assert findings(look()) == [] or look().gpus, "the tests' environment has everything"
    assert doctor.main(["pretrain", "--json", str(tmp_path / "found.json")]) == 0
    assert "pretrain    ready" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["can_run"] is True
    monkeypatch.setattr(doctor, "look", lambda: Facts(**{**vars(HERE), "versions": {"torch": "2"}}))
    assert doctor.main(["pretrain"]) == 1
    assert "pip install 'neurostorm[train]'" in capsys.readouterr().out
