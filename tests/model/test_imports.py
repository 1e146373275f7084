import subprocess
import sys

FORBIDDEN = {"ray", "zarr", "deepspeed", "mlflow", "pydantic", "pyarrow"}
IMPORT_ALL = """
import importlib.util, pkgutil, sys
import neurostorm.model as package
names = {module.name for module in pkgutil.iter_modules(package.__path__)}
if importlib.util.find_spec("triton") is None:  # comes with torch's builds for GPUs
    names -= {"scan_triton", "strd_triton"}
for name in names:
    importlib.import_module("neurostorm.model." + name)
print(len(names), *{name.split(".")[0] for name in sys.modules})
"""


def test_the_model_is_plain_torch():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True)
    modules, *loaded = done.stdout.split()
    assert int(modules) >= 8 and "torch" in loaded
    assert not FORBIDDEN & set(loaded)
