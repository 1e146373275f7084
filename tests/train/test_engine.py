"""DeepSpeed behind the engine: all ZeRO stages train alike, and a step that is not finite changes nothing."""

import pytest
import torch
from torch import nn

from neurostorm.config import TrainConfig
from neurostorm.model.hub import load_pretrained
from neurostorm.train.engine import deepspeed_settings, parameter_groups

STEPS = {"max_steps": 6, "global_batch": 4, "micro_batch": 1, "validate_every": 100, "log_every": 100}


@pytest.fixture
def trained(ball_config, run_ranks, read_ledger, tmp_path):
    """Trains six steps on two ranks; returns the losses by step and the exported weights."""

    def train(**settings):
        name = "-".join(f"{key}{value}" for key, value in settings.items())
        config = ball_config(run={"name": name, "output": tmp_path}, train={**STEPS, **settings})
        run_ranks(config)
        weights = load_pretrained(config.run.folder / "model").state_dict()
        return [read_ledger(config)[step]["loss"] for step in range(6)], weights

    return train


def test_all_zero_stages_give_the_same_losses_and_weights(trained):
    losses, weights = zip(*(trained(zero_stage=stage) for stage in range(4)), strict=True)
    assert losses[0][0] != losses[0][5]
    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-5)
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[stage][name], value, rtol=1e-4, atol=1e-5, msg=f"stage {stage}: {name}")


def test_bf16_trains_close_to_fp32_and_is_not_fp32(trained):
    (full, _), (half, weights) = trained(zero_stage=1), trained(zero_stage=1, dtype="bf16")
    assert half == pytest.approx(full, rel=2e-2)
    assert half != full
    assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_on_one_rank_changes_no_parameter_on_any(stage, ball_config, run_ranks):
    config = ball_config(train={**STEPS, "max_steps": 4, "zero_stage": stage}, run={"name": f"poison{stage}"})
    run_ranks(config, 0, 2)
    for rank in range(2):
        lines = (config.run.folder / f"steps-{rank}.txt").read_text().splitlines()
        assert lines == [
            "0 applied=True changed=True",
            "1 applied=True changed=True",
            "2 applied=False changed=False",
            "3 applied=True changed=True",
        ]


def test_weight_decay_acts_on_matrices_only():
    model = nn.Module()
    model.linear, model.norm = nn.Linear(3, 2), nn.LayerNorm(3)
    model.pos_embed = nn.Parameter(torch.zeros(1, 3, 2, 2, 2, 1))
    model.window_mask_token = nn.Parameter(torch.zeros(8, 3))
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decay, rest = parameter_groups(model, 0.1)
    assert [id(p) for p in decay["params"]] == [id(model.linear.weight)]
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 5


def test_the_accumulation_is_what_is_left_of_the_workers_share():
    settings = deepspeed_settings(TrainConfig(micro_batch=4, clip_norm=0.5), clips_per_worker=16)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
