"""DeepSpeed's files are loaded at every ZeRO stage, by as many workers as saved them or by others, without running what
may have been put into them.
"""

import os
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint.constants import AUTOEP_LAYERS_KEY

from neurostorm.train.universal import make_universal
from neurostorm.train.unpickle import tensors_only
from tests.train.conftest import run_together
from tests.train.load_program import Trap

PROGRAM = Path(__file__).with_name("load_program.py")
FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


def run(folder: Path, stage: int, dtype: str, workers: int, trap: str, regroup: bool = False) -> list[tuple[int, str]]:
    """(exit status, output) of each rank."""
    ranks = range(workers)
    return run_together(PROGRAM, [[folder, stage, dtype, rank, workers, None, trap, int(regroup)] for rank in ranks])


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_every_stage_loads_what_it_saved_and_goes_on_alike(stage: int, dtype: str, tmp_path: Path) -> None:
    results = run(tmp_path, stage, dtype, 2, "none")
    assert [status for status, _ in results] == [0, 0], results[0][1][-3000:]


@pytest.mark.parametrize(("stage", "dtype"), [(2, "fp32"), (1, "bf16")])
def test_what_was_regrouped_goes_on_alike(stage: int, dtype: str, tmp_path: Path) -> None:
    results = run(tmp_path, stage, dtype, 2, "none", regroup=True)
    assert [status for status, _ in results] == [0, 0], results[0][1][-3000:]


@pytest.mark.parametrize(
    ("stage", "file", "regroup"),
    [
        (0, "model_states", False), (1, "model_states", False), (1, "optim_states", False), (3, "optim_states", False),
        (1, "model_states", True), (1, "optim_states", True),
    ],
)  # fmt: skip
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(
    stage: int, file: str, regroup: bool, tmp_path: Path
) -> None:
    ((status, output),) = run(tmp_path, stage, "fp32", 1, file, regroup)
    assert status != 0
    assert f"RuntimeError: {tmp_path}: refused, a file holds more than tensors and plain values" in output
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("where", ["key", "deep", "experts"])
def test_a_checkpoint_whose_names_lead_out_is_not_regrouped(where: str, tmp_path: Path) -> None:
    leading = {
        "key": {"../../out": 1}, "deep": {"optimizer_state_dict": {"param_slice_mappings": [{"/out": 1}]}},
        "experts": {AUTOEP_LAYERS_KEY: [{"expert_key_prefix": "../../out"}]},
    }  # fmt: skip
    state = tmp_path / "state"
    state.mkdir()
    torch.save(leading[where], state / "mp_rank_00_model_states.pt")
    with pytest.raises(RuntimeError, match=r"regrouped[^Z]*ValueError: .*pt: (.*cannot name|.*leads out|experts of)"):
        make_universal(state, tmp_path / "scratch" / "state")
    assert list(tmp_path.iterdir()) == [state]


def test_the_trap_of_these_tests_does_run_where_nothing_holds_it(tmp_path: Path) -> None:
    torch.save({"trap": Trap(tmp_path / "owned")}, tmp_path / "state.pt")
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)["trap"].close()
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("set_before", FORCED)
def test_the_process_is_as_it_was_afterwards_and_no_setting_of_it_opens_the_door(
    set_before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FORCED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(set_before, "1")
    torch.save({"trap": Trap(tmp_path / "owned")}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError), tensors_only():
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "owned").exists()
    assert {name: os.environ.get(name) for name in FORCED} == {
        name: "1" if name == set_before else None for name in FORCED
    }
