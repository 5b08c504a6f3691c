#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0, numpy 2.4.6
#
# What happens: a checkpoint of Lightning has no state of random number generators. A run that seed_everything starts
# and that goes on from the checkpoint of its second epoch, in one process and with shuffle=True, trains its third epoch
# on the batches of the first one, its fourth on those of the second: not on those of a run that was never stopped.
# Why it surprises: weights, optimizer, loops and counters are resumed. In two or more processes the sampler that
# Lightning puts in takes its order from the number of the epoch, and the same script resumes as if nobody had stopped it.
#
# Output seen:
#   never stopped: 5 1 3 0 4 2 | 5 3 0 2 4 1 | 3 0 1 4 2 5 | 5 3 2 1 0 4
#   resumed at |:                            | 5 1 3 0 4 2 | 5 3 0 2 4 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PY'
import logging
import sys

import lightning
import torch
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen += batch.tolist()
        return (self.weight - batch.float()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(epochs, checkpoint=None):
    """What a script does, each time that it is started."""
    lightning.seed_everything(7, verbose=False)
    module = Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, **quiet)
    trainer.fit(module, DataLoader(torch.arange(6), 2, shuffle=True), ckpt_path=checkpoint)
    trainer.save_checkpoint("last.ckpt")
    return [module.seen[i : i + 6] for i in range(0, len(module.seen), 6)]


def text(epochs):
    return " | ".join(" ".join(map(str, epoch)) for epoch in epochs)


whole = run(4)
run(2)
resumed = run(4, "last.ckpt")
print(f"never stopped: {text(whole)}")
print(f"resumed at |: {' ' * 26} | {text(resumed)}")
if resumed != whole[:2] or resumed == whole[2:]:
    sys.exit("the behaviour has changed")
PY
