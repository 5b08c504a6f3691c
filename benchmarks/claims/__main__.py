"""Tests the papers' claims on photographs of Pascal VOC, or on others in its layout, and writes what holds.

Every stage is kept in ``--work``: a run that was stopped goes on where it was.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from data.sample import DataError
from engine.command import output_folder
from engine.storage import StorageError

from benchmarks.__main__ import HERE, environment
from benchmarks.claims import boxes, contours, few_masks, maps, ood, refinement, report, seeds, sizes
from benchmarks.claims.shared import Outcome, Work

CLAIMS: dict[str, Callable[[Work], Outcome]] = {
    "sizes": sizes.run,
    "maps": maps.run,
    "contours": contours.run,
    "refinement": refinement.run,
    "few_masks": few_masks.run,
    "ood": ood.run,
    "seeds": seeds.run,
    "boxes": boxes.run,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder in the layout of VOC 2012")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=[*CLAIMS], help="only these; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="images that get maps, the first ones of val and of train (default: 0, all)",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/claims"), help="folder in which stages are kept (default: runs/claims)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "claims",
        help="folder of the results (default: benchmarks/results/claims)",
    )
    options = parser.parse_args(words)
    if options.seeds < 1 or options.images < 0:
        parser.error(f"--seeds, --images: expected at least 1 and 0, got {options.seeds} and {options.images}")
    torch.set_num_threads(1)
    try:
        work = Work(options.data, options.work, options.seeds, options.images)
        work.check()
        for folder in (options.work, options.out):
            output_folder(folder)
        report.read(options.out / "claims.json")  # what cannot be added to is told before hours of work
        for number, name in enumerate(options.claims, 1):
            print(f"claim {number} of {len(options.claims)}: {name}", flush=True)
            images = f" --images {options.images}" if options.images else ""
            command = f"python -m benchmarks.claims --data VOC_FOLDER --claims {name} --seeds {options.seeds}{images}"
            outcome = report.entry(CLAIMS[name](work), command)
            stored = report.read(options.out / "claims.json")
            stored |= {"environment": environment(), "claims": stored["claims"] | {name: outcome}}
            report.write(options.out, stored)
        print((options.out / "claims.md").read_text())
    except (DataError, StorageError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: start it again to go on") from None


if __name__ == "__main__":
    main()
