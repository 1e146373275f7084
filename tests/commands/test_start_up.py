"""A process loads what it uses: Ray starts a dozen for each group of workers, and people wait for all of them."""

import subprocess
import sys

LOADS = """
import sys
import neurostorm.train.controller.feed
assert "torch" not in sys.modules, "plan rows and clips are numpy"
import neurostorm.train.worker
from neurostorm.train.engine import import_deepspeed
import_deepspeed()
loaded = {"torch._dynamo", "mlflow", "matplotlib", "sklearn", "scipy.stats"} & set(sys.modules)
assert not loaded, loaded
import mlflow
mlflow.MlflowClient
"""


def test_feeding_takes_no_torch_and_training_no_compiler_plots_or_tracking():
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
