"""Takes one training step of an arm between the marks that Nsight Compute looks for.

    ncu --profile-from-start off ... python -m saelens_sparse.profile.counted_step FILE

FILE names the arm and the settings; `counters.py` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from saelens_sparse.profile.settings import ARMS, Settings
from saelens_sparse.profile.steps import FIRST_STEPS, prepared_trainer
from saelens_sparse.profile.trainers import prepare_inputs, take_step


def main(path: Path) -> None:
    request = json.loads(path.read_text())
    settings = Settings.from_json(request["settings"])
    inputs = prepare_inputs(
        settings.case, settings.precision, settings.device, settings.warmup_train
    )
    trainer = prepared_trainer(ARMS[request["arm"]], settings, inputs)
    output = None
    for _ in range(FIRST_STEPS):
        output = take_step(trainer, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    output = take_step(trainer, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    del output


if __name__ == "__main__":
    main(Path(sys.argv[1]))
