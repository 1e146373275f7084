"""DeepSpeed's files are loaded at every ZeRO stage, by as many workers as saved them or by others, without running what
may have been put into them.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neurostorm.train.checkpoint.unpickle import tensors_only
from tests.train.load_program import Trap, main
from tests.train.ranks import run_together

FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


# stage, dtype, trap, convert
ALIKE = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]
CONVERTED = [(2, "fp32"), (1, "bf16")]
TRAPPED = [
    (0, "model_states", False), (1, "model_states", False), (1, "optim_states", False), (3, "optim_states", False),
    *((stage, file, True) for stage, file in [(0, "model_states"), (1, "model_states"), (3, "optim_states")]),
]  # fmt: skip
OF_TWO = [(*case, None, False) for case in ALIKE] + [(*case, None, True) for case in CONVERTED]
OF_ONE = [(stage, "fp32", trap, convert) for stage, trap, convert in TRAPPED]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[object, ...]], tuple[Path, set[str]]]:
    """The folder of a case and what its ranks said of it; all cases of as many ranks run in the same processes."""
    homes = {}
    for workers, cases in ((2, OF_TWO), (1, OF_ONE)):
        homes[workers] = tmp_path_factory.mktemp(f"{workers}-ranks")
        run_together(main, workers, homes[workers], cases)

    def find(case: tuple[object, ...]) -> tuple[Path, set[str]]:
        workers, cases = (2, OF_TWO) if case in OF_TWO else (1, OF_ONE)
        folder = homes[workers] / str(cases.index(case))
        return folder, {(folder / f"outcome-{rank}.txt").read_text() for rank in range(workers)}

    return find


@pytest.mark.parametrize(("stage", "dtype"), ALIKE)
def test_every_stage_loads_what_it_saved_and_goes_on_alike(stage: int, dtype: str, outcome) -> None:
    assert outcome((stage, dtype, None, False))[1] == {"well"}


@pytest.mark.parametrize(("stage", "dtype"), CONVERTED)
def test_what_was_converted_goes_on_alike(stage: int, dtype: str, outcome) -> None:
    assert outcome((stage, dtype, None, True))[1] == {"well"}


@pytest.mark.parametrize(("stage", "file", "convert"), TRAPPED)
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(
    stage: int, file: str, convert: bool, outcome
) -> None:
    folder, (said,) = outcome((stage, "fp32", file, convert))
    assert f"RuntimeError: {folder}: refused, a file holds more than tensors and plain values" in said
    assert not (folder / "owned").exists()


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
