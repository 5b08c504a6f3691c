"""Writes the scenes as a folder in the layout of Pascal VOC 2012, for the examples that have ``--data voc``."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from data.scenes import Scenes
from data.write_voc import write_voc
from engine.command import check_least, parse


@dataclass(frozen=True)
class Config:
    """Writes scenes in the layout of Pascal VOC 2012: the splits train, val and final."""

    out: Path
    """Folder that is written, the counterpart of VOC2012; new or empty."""
    train: int = 1500
    """Number of training scenes."""
    val: int = 200
    """Number of scenes on which settings are chosen."""
    final: int = 200
    """Number of scenes kept for figures to report."""
    size: int = 64
    """Height and width of the scenes in pixels."""
    seed: int = 0
    """Seed of the training scenes; those of val and final are always of seed 0."""
    void_width: int = 1
    """Width in pixels of the border around objects that is labelled void."""

    def __post_init__(self) -> None:
        check_least(self, train=1, val=1, final=1, size=32, seed=0, void_width=0)


def main(config: Config) -> None:
    splits = {
        "train": Scenes("train", config.train, size=config.size, seed=config.seed, void_width=config.void_width),
        "val": Scenes("val", config.val, size=config.size, void_width=config.void_width),
        "final": Scenes("final", config.final, size=config.size, void_width=config.void_width),
    }
    try:
        write_voc(config.out, splits)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: cannot write to {config.out}: {error.strerror}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    count = sum(map(len, splits.values()))
    folder = shlex.quote(str(config.out))
    print(f"{count} scenes are in {folder}; to use them: python examples/quickstart.py --data voc --root {folder}")


if __name__ == "__main__":
    main(parse(Config))
