"""The fault `withdrawn`: a participant is removed with tools/store.py while a run trains; then the driver is killed.

    run:        start ---- remove -- clips left out ---- driver killed -- the same command --> end
    reference:  start ---- the same rows left out from the first moment ----------------------> end   --> equal losses

Each round has a store of its own. The reference knows of no withdrawal: a hook in its workers leaves out the rows that
the run's journal names.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.check import loss_problems
from chaos.faults import HOOK, Fault
from chaos.job import ROOT, Ledger, entries
from chaos.scene import Scene
from neurostorm.data.withdrawals import subject_of
from neurostorm.io.paths import to_path


def own_store(scene: Scene) -> Callable[[], None]:
    """Gives the run a copy of the store."""
    store = Path(f"{scene.setting.store}-{scene.config.run.name}")
    shutil.copytree(scene.setting.store, store)
    data = scene.config.data.model_copy(update={"store": to_path(store)})
    scene.config = scene.config.model_copy(update={"data": data})
    return lambda: shutil.rmtree(store)


def remove_participant(scene: Scene) -> None:
    """Removes whose clip was used last; kills the driver once a clip of theirs was left out."""
    last = entries(scene.job.folder / "ledger" / "rank-0.jsonl")[-1]
    who = subject_of(last["clips"][0])
    remove = [sys.executable, str(ROOT / "tools" / "store.py"), "remove", str(scene.config.data.store)]
    subprocess.run([*remove, "--subject", who, "--yes"], check=True, capture_output=True)
    scene.job.wait_for(lambda: bool(left_out(scene)), f"a clip of {who} that is left out")
    scene.job.kill()
    scene.struck()
    scene.start()


def left_out(scene: Scene) -> dict[int, dict[str, Any]]:
    """Row -> what the journals of all ranks say of it."""
    files = sorted(scene.job.folder.glob("withdrawn-*.jsonl"))
    return {entry["row"]: entry for file in files for entry in entries(file)}


def check_end(scene: Scene) -> None:
    """What the run says of the participant, and that no clip of theirs was used once they were left out."""
    said, found = scene.job.output(), left_out(scene)
    people = {subject_of(entry["clip"]) for entry in found.values()}
    scene.note(len(people) == 1, f"clips of {len(people)} participants were left out")
    scene.note(all(f"{who} (" in said for who in people), "the second start did not name the participant")
    summary = json.loads((scene.job.folder / "summary.json").read_text())
    scene.note(summary["withdrawn_subjects"] == 1, f"the summary counts {summary['withdrawn_subjects']}")
    extra = json.loads((scene.job.folder / "model" / "config.json").read_text())["extra"]
    scene.note(len(extra["withdrawn"]) == 1, f"the model lists {len(extra['withdrawn'])} who withdrew")
    unreadable = list(scene.job.folder.glob("unreadable-*.jsonl"))
    scene.note(not unreadable, "clips of the participant were called damaged")


def reference(scene: Scene, plain: Ledger) -> Ledger:
    """The ledger of a run in which the same rows are left out; notes where the run was not yet that without a fault."""
    rows = left_out(scene)
    first = min((entry["step"] for entry in rows.values()), default=0)
    for problem in loss_problems({step: words for step, words in plain.items() if step < first}, scene.words()):
        scene.note(False, f"before the first clip that is left out, {problem}")
    name = f"{scene.config.run.name}-reference"
    file = scene.setting.folder / f"{name}.json"
    file.write_text(json.dumps(sorted(rows)))
    run = scene.config.run.model_copy(update={"name": name})
    data = scene.config.data.model_copy(update={"store": to_path(scene.setting.store)})
    other = Scene(scene.setting, scene.config.model_copy(update={"run": run, "data": data}), random.Random(0))
    other.environment |= {"CHAOS_LEAVE_OUT": str(file), "PYTHONPATH": f"{HOOK}:{ROOT}"}
    try:
        other.start().finish(600)
    finally:
        other.close()
    return other.words()


WITHDRAWN: dict[str, Fault] = {
    "withdrawn": Fault(remove_participant, fresh=True, prepare=own_store, check=check_end, reference=reference)
}
