"""The file of all figures, and the table that is made of it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import storage
from engine.storage import StorageError

from benchmarks.claims.shared import Estimate, Outcome

Stored = dict[str, Any]  # claims.json: "environment", and of each claim what it measured

TITLES = {
    "sizes": "1. Sizes",
    "maps": "2. Maps",
    "contours": "5. ISL and FSL",
    "refinement": "3. Refinement and networks",
    "few_masks": "4. Few masks",
    "ood": "6. W-OoD",
    "seeds": "7. FickleNet, seed growing, constrain to boundary",
    "boxes": "8. BBAM",
}


def read(path: Path) -> Stored:
    """What the claims before found.

    Raises:
        StorageError: a file that cannot be read, or that :func:`write` has not written.
    """
    if not os.path.lexists(path):
        return {"claims": {}}
    try:
        stored: Stored = json.loads(path.read_text())
        markdown(stored).encode()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {storage.reason(error)}") from error
    return stored


def write(folder: Path, stored: Stored) -> None:
    """Writes ``claims.json`` and ``claims.md``."""
    storage.write(folder / "claims.json", (json.dumps(stored, indent=1) + "\n").encode())
    storage.write(folder / "claims.md", markdown(stored).encode())


def entry(outcome: Outcome, command: str) -> Stored:
    """An outcome as JSON has it."""
    return {
        "command": command,
        "about": outcome.about,
        "figures": {name: values(found) for name, found in outcome.figures.items()},
        "verdicts": [
            {
                "statement": verdict.statement,
                "paper": verdict.paper,
                "found": values(verdict.found) if verdict.found else None,
                "unit": verdict.unit,
                "scenes": verdict.scenes,
                "holds": verdict.holds,
            }
            for verdict in outcome.verdicts
        ],
    }


def values(found: Estimate) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else round(value, 2) for key, value in found._asdict().items()}


def markdown(stored: Stored) -> str:
    """A table of statements and one of figures for each claim."""
    where = stored.get("environment", {})
    lines = [f"{where['processor']}, {where['threads']} thread, torch {where['torch']}.", ""] if where else []
    for name in sorted(stored["claims"], key=lambda name: TITLES[name]):
        claim = stored["claims"][name]
        lines += [f"## {TITLES[name]}", "", f"`{claim['command']}`: {claim['about']}.", ""]
        lines += ["| statement | paper | scenes | photographs | interval | |", "|---|---|---|---|---|---|"]
        for verdict in claim["verdicts"]:
            found, unit = verdict["found"], verdict["unit"]
            here, interval = (text(found, unit), between(found)) if found else ("", "")
            cells = (*(verdict[key] for key in ("statement", "paper", "scenes")), here, interval, verdict["holds"])
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| figure | | interval |", "|---|---|---|"]
        for title, found in claim["figures"].items():
            lines.append(f"| {title} | {text(found, '')} | {between(found)} |")
        lines.append("")
    return "\n".join(lines)


def text(found: Mapping[str, float | None], unit: str) -> str:
    """A figure with its spread; differences have a sign."""
    value, spread = found["value"], found["spread"]
    shown = f"{value:+.1f}" if unit == "points" else f"{value:.1f}"
    return shown + ("%" if unit == "%" else "") + (f" ±{spread:.1f}" if spread is not None else "")


def between(found: Mapping[str, float | None]) -> str:
    return "" if found["low"] is None else f"{found['low']:.1f} to {found['high']:.1f}"
