"""Which networks segattr handles: those of torchvision, timm and transformers, with random weights, in float64.

For each network and method: right, wrong, or refused, against what is computed of the network by other means. Writes
networks.json after each network, from which it goes on when it is started again, and networks.md, tables by family.
"""

import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.__main__ import HERE, environment
from benchmarks.frontier import Parser
from benchmarks.memory import status
from benchmarks.zoo_checks import METHODS, judge
from benchmarks.zoo_networks import family, images_for, names, network

Row = dict[str, Any]

VERDICTS = ("right", "refused", "wrong", "unknown")


def measure(name: str, methods: list[str]) -> Row:
    """The verdict on each method, and time and memory of all of them with their checks."""
    model = network(name)
    images = images_for(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = status("VmRSS"), time.perf_counter()
    verdicts = judge(model, images, methods)
    return {
        "name": name,
        "family": family(model),
        "size": list(images.shape[2:]),
        "parameters": parameters,
        "seconds": round(time.perf_counter() - start, 1),
        "megabytes": round((status("VmHWM") - before) / 2**20),
        **{method: verdict[:300] for method, verdict in verdicts.items()},
    }


def in_a_process(name: str, methods: list[str], patience: float) -> Row:
    """The row of a network, also of one that hangs, raises or takes the process down."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(name, methods, theirs))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv() if ours.poll(patience) else _failed(name, methods, f"longer than {patience:g} s")
    except EOFError:
        row = _failed(name, methods, "its process ended")
    process.kill()
    process.join()
    return row


def _send(name: str, methods: list[str], pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        pipe.send(measure(name, methods))
    except Exception as error:
        pipe.send(_failed(name, methods, f"{type(error).__name__}: {error}"))


def _failed(name: str, methods: list[str], problem: str) -> Row:
    return {"name": name, "family": "", **dict.fromkeys(methods, f"wrong: {problem[:300]}")}


def tables(rows: list[Row], where: dict[str, Any]) -> str:
    methods = [method for method in METHODS if any(method in row for row in rows)]
    counts = " ".join(f"{library} {n}," for library, n in Counter(_library(row) for row in rows).items())
    lines = [
        f"{len(rows)} networks ({counts[:-1]}), torch {where['torch']}. Right / refused / wrong, by the file of the "
        "library that a network is in.",
        "",
        _line("family", "networks", *methods),
        _line(*["---"] * (len(methods) + 2)),
        _line("**all**", len(rows), *(_counts(rows, method) for method in methods)),
    ]
    for name in sorted({_family(row) for row in rows}):
        own = [row for row in rows if _family(row) == name]
        lines.append(_line(name, len(own), *(_counts(own, method) for method in methods)))
    lines += ["", "What is refused or wrong:", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for method in methods:
            verdict = row.get(method, "right")
            told = method != "split" and verdict == row.get("split")
            if verdict != "right" and not told:
                reasons.setdefault(f"`{method}` {_kind_of(verdict)}", []).append(row["name"].partition("/")[2])
    lines += [
        f"- {reason}: {len(own)} ({', '.join(own[:6])}{', ...' if len(own) > 6 else ''})"
        for reason, own in sorted(reasons.items())
    ]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    megabytes = [row["megabytes"] for row in rows if "megabytes" in row]
    if seconds:
        lines += [
            "",
            f"All methods of a network, with their checks, take {median(seconds):.1f} s in the median and at most "
            f"{max(seconds):.0f} s, and {median(megabytes):.0f} MB beyond the network and at most {max(megabytes)} MB, "
            "on one thread.",
        ]
    return "\n".join(lines) + "\n"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _library(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def _family(row: Row) -> str:
    return f"{_library(row)} {row['family']}".strip()


def _counts(rows: Iterable[Row], method: str) -> str:
    found = Counter(str(row[method]).partition(":")[0] for row in rows if method in row)
    return f"{found['right']} / {found['refused']} / {found['wrong'] + found['unknown']}" if found else "-"


def _kind_of(verdict: str) -> str:
    """A message without what is particular to a network."""
    return re.sub(r"\d[\d.e-]*", "n", verdict.partition(" (see ")[0])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.zoo", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of library/name, such as 'timm/*vit*'")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "zoo")
    parser.add_argument("--again", action="store_true", help="also networks whose results are there")
    parser.add_argument("--patience", type=float, default=600, metavar="SECONDS", help="for a network")
    options = parser.parse_args(arguments)
    parser.folder(options.output, "--output")
    path = options.output / "networks.json"
    stored = json.loads(path.read_text()) if path.exists() else {"networks": []}
    rows = {row["name"]: row for row in stored["networks"]}

    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["benchmarks.zoo_networks", "benchmarks.zoo_checks", "timm", "transformers"]
    )
    chosen = [name for name in names() if fnmatch(name, options.only)]
    if not chosen:
        parser.error(f"--only: expected a pattern of networks, got {options.only}")
    for name in (progress := tqdm(chosen)):
        progress.set_description(name)
        if not options.again and all(method in rows.get(name, {}) for method in options.methods):
            continue
        row = in_a_process(name, options.methods, options.patience)
        rows[name] = rows.get(name, {}) | row
        progress.write("  ".join([name, *(f"{m}: {row[m]}" for m in options.methods)]))
        stored = {"where": environment(), "networks": [rows[key] for key in names() if key in rows]}
        lines = ",\n".join(json.dumps(entry) for entry in stored["networks"])
        path.write_text(f'{{"where": {json.dumps(stored["where"])},\n"networks": [\n{lines}\n]}}\n')
        (options.output / "networks.md").write_text(tables(stored["networks"], stored["where"]))
    wrong = [row["name"] for row in rows.values() if any(str(row.get(m)).startswith("wrong") for m in options.methods)]
    print(f"{len(rows)} networks, wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
