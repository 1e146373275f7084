"""Golden tensors of the released code: the full set beside the checkout when it is there, a mini set always."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from neurostorm.model.config import SwinConfig

MINI = Path(__file__).resolve().parents[1] / "data" / "golden_mini"
FULL = Path(__file__).resolve().parents[2].parent / "shared" / "golden"


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]  # the reference's hyperparameters
    tensors: dict[str, Tensor]
    noise: float  # float32 against float64, of the output
    seed: int | None  # of torch's generator before the released run

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.group("sd.")

    @property
    def grads(self) -> dict[str, Tensor]:
        return self.group("grad.")

    @property
    def swin(self) -> SwinConfig:
        """The same shape as our configuration, attention mixer."""
        c = self.config
        return SwinConfig(
            c["img_size"], c["patch_size"], c["in_chans"], c["embed_dim"], c["depths"], c["num_heads"],
            c["window_size"], c["first_window_size"], c["last_layer_full_MSA"], layout="paper",
        )  # fmt: skip

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def close(self, actual: Tensor, expected: str | Tensor) -> None:
        """Assert equality within ten times the float noise or 1e-4 of the scale, whichever is larger."""
        reference = self.tensors[expected] if isinstance(expected, str) else expected
        assert actual.shape == reference.shape
        error, scale = (actual - reference).abs().max().item(), reference.abs().max().item()
        assert error <= max(10 * self.noise, 1e-4 * scale), f"error {error} at scale {scale}"


def _load(folder: Path, name: str) -> Golden:
    file = f"{name}.safetensors"
    entry = next(e for e in json.loads((folder / "MANIFEST.json").read_text())["files"] if e["file"] == file)
    table = folder / "tolerances.json"
    tolerances = json.loads(table.read_text()).get(file, {}) if table.exists() else {}
    noise = max((v for k, v in tolerances.get("float64", {}).items() if k != "scale"), default=0.0)
    seed = re.search(r"seed[=(](\d+)", entry["made_by"])
    return Golden(entry["config"], load_file(folder / file), noise, int(seed[1]) if seed else None)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loader by name without extension; ``mini:`` before it takes the set kept beside the tests."""

    def load(name: str) -> Golden:
        if name.startswith("mini:"):
            return _load(MINI, name.removeprefix("mini:"))
        if not (FULL / "MANIFEST.json").exists():
            pytest.skip("the golden tensors of the released code are not beside the checkout (../shared/golden)")
        return _load(FULL, name)

    return load


@pytest.fixture(scope="session")
def golden_names() -> Callable[[str], dict[str, Any]]:
    """Names and shapes of the released models' parameters at their default configuration."""
    if not (FULL / "state_dict_default.json").exists():
        pytest.skip("the golden tensors of the released code are not beside the checkout (../shared/golden)")
    released = json.loads((FULL / "state_dict_default.json").read_text())
    return lambda name: released[name]
