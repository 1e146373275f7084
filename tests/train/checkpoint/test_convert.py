"""A checkpoint of any ZeRO stage and number of workers is loaded at any other, and training goes on from it alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from neurostorm.train.checkpoint.restored_state import write_state
from neurostorm.train.checkpoint.saved_state import read_state
from neurostorm.train.checkpoint.unpickle import tensors_only
from tests.train import convert_program
from tests.train.convert_program import STAGES, WORKERS
from tests.train.ranks import run_together

FILE = "mp_rank_00_model_states.pt"
TRAINED = ["first.weight", "last.weight", "unused", "first.bias", "norm.weight", "norm.bias", "last.bias"]
FORMS = [(stage, workers) for stage in STAGES for workers in WORKERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form saved, and loaded in every form."""
    made = tmp_path_factory.mktemp("convert")
    for program in (convert_program.save, convert_program.load):
        for workers in WORKERS:
            run_together(program, workers, made)
    return made


@pytest.mark.parametrize(("stage", "workers"), FORMS)
@pytest.mark.parametrize(("before", "ranks"), FORMS)
def test_a_changed_stage_or_number_of_workers_goes_on_alike(before, ranks, stage, workers, folder):
    saved = folder / f"saved-{before}-{ranks}"
    expected = torch.load(saved / "expected.pt")
    result = torch.load(folder / f"loaded-{stage}-{workers}-from-{before}-{ranks}.pt")
    assert "error" not in result, result["error"]
    assert result["decays"] == [[0.5, 0.0], [0.5, 0.0]]
    for name, value in expected["saved"].items():
        assert torch.equal(result["saved"][name], value), f"{name} is another weight"
    parts = convert_program.parts(saved)
    assert parts["step first.weight"] == 2
    assert parts.keys() == result["again"].keys()
    for name, value in parts.items():
        assert torch.equal(torch.as_tensor(result["again"][name]), torch.as_tensor(value)), f"{name} changed"
    assert result["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    for name, value in expected["after"].items():
        torch.testing.assert_close(result["after"][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_checkpoint_with_names_of_another_model_is_refused(tmp_path):
    """Names in a file are compared with the model's; none becomes a path."""
    content = torch.load(make_state(tmp_path), weights_only=True)
    content["module"]["../../out"] = content["module"].pop("frozen")
    torch.save(content, tmp_path / FILE)
    state = read_state(tmp_path, TRAINED)
    engine = SimpleNamespace(module=convert_program.Model(0))
    with pytest.raises(RuntimeError, match=r"of another model: \.\./\.\./out, frozen are in one"):
        write_state(engine, 0, state)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_a_checkpoint_with_other_shapes_is_refused(tmp_path):
    content = torch.load(make_state(tmp_path), weights_only=True)
    content["module"]["frozen"] = torch.zeros(2, 3)
    torch.save(content, tmp_path / FILE)
    state = read_state(tmp_path, TRAINED)
    with pytest.raises(RuntimeError, match="6 numbers of weight were saved, the model has 15"):
        write_state(SimpleNamespace(module=convert_program.Model(0), optimizer=None), 0, state)


def test_ranks_are_in_the_order_of_their_numbers_and_none_may_be_missing(tmp_path):
    """The eleventh file comes after the tenth, not after the second."""
    content = torch.load(make_state(tmp_path), weights_only=True)
    torch.save({**content, "dp_world_size": 11}, tmp_path / FILE)
    places = {"norm.weight": fragment_address(numel=1, start=0)}
    for rank in range(11):
        optimizer = {
            "base_optimizer_state": {"state": {}}, "param_slice_mappings": [places],
            "single_partition_of_fp32_groups": [torch.tensor([float(rank)])],
        }  # fmt: skip
        torch.save({"optimizer_state_dict": optimizer}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    with tensors_only():
        found = read_state(tmp_path, TRAINED).parameters["norm.weight"]
        assert found.whole("weight", torch.Size([11])).tolist() == list(range(11))
        assert not found.whole("exp_avg", torch.Size([11])).any()
        (tmp_path / "zero_pp_rank_4_mp_rank_00_optim_states.pt").unlink()
        with pytest.raises(RuntimeError, match="files of some ranks are missing"):
            read_state(tmp_path, TRAINED)


def make_state(folder: Path) -> Path:
    """A file as stage 0 saves it, before the first step."""
    model = convert_program.Model(0)
    groups = [{"params": list(range(len(TRAINED)))}]
    content = {
        "module": model.state_dict(), "buffer_names": ["shift"], "optimizer": {"param_groups": groups, "state": {}},
        "dp_world_size": 1, "global_steps": 0, "skipped_steps": 0, "global_samples": 0,
    }  # fmt: skip
    torch.save(content, folder / FILE)
    return folder / FILE
