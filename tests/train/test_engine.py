"""DeepSpeed behind the engine: all ZeRO stages train alike, and a step that is not finite changes nothing."""

import pytest
import torch
from torch import nn

from neurostorm.config import TrainConfig
from neurostorm.model.hub.pretrained import load_pretrained
from neurostorm.train.engine import deepspeed_settings
from neurostorm.train.optimizer import parameter_groups
from tests.train import gradient_program
from tests.train.ranks import run_together

STEPS = {"max_steps": 7, "global_batch": 4, "micro_batch": 1, "validate_every": 100, "log_every": 100}
POISONED, PASSING = 5, 3


SETTINGS = (  # zero_stage, dtype, mixer, decoder, poisoned
    *((stage, "fp32", "attention", "paper", True) for stage in range(4)),
    (1, "fp32", "attention", "paper", False), (1, "bf16", "attention", "paper", True),
    (1, "fp32", "mamba", "light", True), (3, "fp32", "mamba", "light", True),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(ball_config_in, run_ranks, read_ledger, tmp_path_factory):
    """Trains seven steps on two ranks, step 5 with infinite values on rank 0, step 3 too but at the first try alone.

    Gives, for each of SETTINGS, the losses by step, what each step did on each rank, and the exported weights.
    """
    output, configs = tmp_path_factory.mktemp("engine"), {}
    for number, setting in enumerate(SETTINGS):
        stage, dtype, mixer, decoder, _ = setting
        model = {"embed_dim": 8, "depths": (2, 1), "heads": (1, 2), "mixer": mixer, "decoder": decoder}
        train = {**STEPS, "zero_stage": stage, "dtype": dtype}
        configs[setting] = ball_config_in(output, run={"name": f"run-{number}"}, train=train, model=model)
    run_ranks(list(configs.values()), [POISONED if setting[-1] else -1 for setting in SETTINGS])

    def find(zero_stage, dtype="fp32", mixer="attention", decoder="paper", poisoned=True):
        config = configs[zero_stage, dtype, mixer, decoder, poisoned]
        losses = [entry["loss"] for _, entry in sorted(read_ledger(config).items())]
        notes = [config.run.folder / f"steps-{rank}.txt" for rank in range(2)]
        steps = [note.read_text().splitlines() if poisoned else [] for note in notes]
        return losses, steps, load_pretrained(config.run.folder / "model").state_dict()

    return find


def test_all_zero_stages_give_the_same_losses_and_weights(trained):
    plain, _, weights = trained(0)
    assert plain[0] != plain[4]
    for stage in (1, 2, 3):
        losses, _, others = trained(stage)
        assert losses[:POISONED] == pytest.approx(plain[:POISONED], rel=1e-5)
        for name, value in weights.items():
            if name.endswith("qkv.bias"):
                continue  # the softmax does not feel the keys' bias: its gradient is rounding, which Adam scales up
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5, msg=f"stage {stage}: {name}")


def test_partitioned_parameters_reach_the_scan_the_light_decoder_and_their_backward(trained):
    sides = (trained(stage, mixer="mamba", decoder="light") for stage in (1, 3))
    (plain, _, weights), (partitioned, _, others) = sides
    assert plain[0] != plain[4]
    assert partitioned[:POISONED] == pytest.approx(plain[:POISONED], rel=1e-5)
    for name, value in weights.items():
        if not name.endswith("qkv.bias"):  # see above
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_on_one_rank_changes_no_parameter_on_any(stage, trained):
    tries = [(0, True), (1, True), (2, True), (PASSING, False), (PASSING, True), (4, True)]
    tries += [(POISONED, False), (POISONED, False), (6, True)]
    expected = [f"{step} applied={done} changed={done}" for step, done in tries]
    assert trained(stage)[1] == [expected, expected]


def test_a_fault_that_passes_leaves_no_trace(trained):
    expected = trained(1, poisoned=False)[0]
    for stage in range(4):
        assert trained(stage)[0][:POISONED] == pytest.approx(expected[:POISONED], rel=1e-5 if stage == 3 else 1e-6)


def test_bf16_trains_close_to_fp32_and_is_not_fp32(trained):
    full, half, weights = trained(1)[0], trained(1, "bf16")[0], trained(1, "bf16")[2]
    assert half[:POISONED] == pytest.approx(full[:POISONED], rel=2e-2)
    assert half != full
    assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())


def test_gradients_in_bf16_are_summed_in_fp32_over_micro_batches_and_ranks(tmp_path):
    """Sums in bf16 differ by 3e-3; DeepSpeed takes them by default for linear and convolutional layers."""
    run_together(gradient_program.main, 2, tmp_path)
    differences = {file.name: float(file.read_text()) for file in tmp_path.iterdir()}
    assert len(differences) == 8
    assert {name: value for name, value in differences.items() if not value < 1e-6} == {}


def test_weight_decay_acts_on_matrices_only():
    model = nn.Module()
    model.linear, model.norm = nn.Linear(3, 2), nn.LayerNorm(3)
    model.pos_embed = nn.Parameter(torch.zeros(1, 3, 2, 2, 2, 1))
    model.window_mask_token = nn.Parameter(torch.zeros(8, 3))
    model.A_log, model.filter = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(6, 1, 4))
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decay, rest = parameter_groups(model, 0.1)
    assert [id(p) for p in decay["params"]] == [id(model.linear.weight)]
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 7


def test_the_accumulation_is_what_is_left_of_the_workers_share():
    settings = deepspeed_settings(TrainConfig(micro_batch=4, clip_norm=0.5), clips_per_worker=16)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
