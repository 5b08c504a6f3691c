"""What ``benchmarks.gpu`` writes: a JSON and a Markdown file, anew after every case, and a line for each case."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import segloss

_WORDS = ("group", "method", "failed", "refused")  # of a row; all else are numbers
_APART = (*_WORDS, "milliseconds", "seconds")  # no column of their own

Row = dict[str, Any]


class Target(NamedTuple):
    """What a number of a row should be: at most for times, at least for shares."""

    group: str
    method: str
    key: str
    number: float


class Report:
    """Rows of results, in a file after each of them; what has not begun after the limit, in seconds, is left out."""

    def __init__(
        self, folder: Path, where: dict[str, Any], targets: Sequence[Target] = (), limit: float = math.inf
    ) -> None:
        self.folder, self.where, self.targets = folder, where, targets
        self.rows, self.left_out = list[Row](), list[str]()
        self.end = time.monotonic() + limit

    def add(self, group: str, method: str, measure: Callable[[Row], None]) -> None:
        """:meth:`record` if there is time."""
        if not self.over(f"{group}: {method}"):
            self.record(group, method, measure)

    def record(self, group: str, method: str, measure: Callable[[Row], None]) -> None:
        """``measure`` fills a row; where it raises, the row says so and keeps what was measured before."""
        row: Row = {"group": group, "method": method}
        print(f"{group}: {method} ", end="", flush=True)  # a run that hangs shows where
        began = time.monotonic()
        try:
            measure(row)
        except segloss.ToleranceError as problem:
            row["refused"] = str(problem)
        except Exception as problem:  # whatever it is, the other cases count
            row["failed"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        row["seconds"] = round(time.monotonic() - began, 2)
        self.rows.append(row)
        print(line(row), flush=True)
        self.write()

    def attempt(self, group: str, measure: Callable[[], None]) -> None:
        """``measure`` adds rows; where it raises, an extra row says so."""
        if self.over(group):
            return
        try:
            measure()
        except Exception as problem:
            reason = problem

            def fail(row: Row) -> None:
                raise reason

            self.record(group, "set-up", fail)

    def over(self, name: str) -> bool:
        """Whether the time is over; then what has this name is left out."""
        late = time.monotonic() >= self.end
        if late:
            self.left_out.append(name)
            self.write()
        return late

    def write(self) -> None:
        results = {"environment": self.where, "results": self.rows, "left out": self.left_out}
        replace(self.folder / "gpu.json", json.dumps(results, indent=1) + "\n")
        replace(self.folder / "gpu.md", markdown(self.rows, self.where, self.targets, self.left_out))

    def failed(self) -> int:
        return sum("failed" in row for row in self.rows)


def replace(path: Path, text: str) -> None:
    """Writes all of a file or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def line(row: Row) -> str:
    """What a row says for the terminal."""
    numbers = [f"{key} {value:.2g}" for key, value in row.items() if key not in _APART]
    return f"{', '.join([outcome(row), *numbers])} [{row['seconds']:.1f} s]"


def outcome(row: Row) -> str:
    if "failed" in row:
        return f"FAILED ({row['failed']})"
    if "refused" in row:
        return "refused"
    return f"{row['milliseconds']:.4g} ms" if "milliseconds" in row else "right"


def markdown(
    rows: list[Row], where: dict[str, Any], targets: Sequence[Target] = (), left_out: Sequence[str] = ()
) -> str:
    copies = f"; copies move {where['limits']['copy'] / 1e12:.2f} TB/s" if where["limits"] else ""
    text = [
        "# Benchmarks on a GPU",
        "",
        f"{where['date']}, {where['gpu']}, torch {where['torch']}, Triton {where['triton']}{copies}. "
        "Median time; error against float64; shares of the limits.",
        "",
        "| target for an H200 | | measured | |",
        "|---|---|---|---|",
        *(target_line(target, rows) for target in targets),
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        here = [row for row in rows if row["group"] == group]
        keys = list(dict.fromkeys(key for row in here for key in row if key not in _APART))
        text += ["", f"## {group}", "", "| " + " | ".join(["method", "result", *keys]) + " |"]
        text.append("|---" * (2 + len(keys)) + "|")
        for row in here:
            cells = [f"{row[key]:.2g}" if key in row else "-" for key in keys]
            text.append("| " + " | ".join([row["method"], outcome(row).replace("|", "\\|"), *cells]) + " |")
    if left_out:
        text += ["", "Left out, the time being over: " + "; ".join(left_out) + "."]
    return "\n".join(text) + "\n"


def target_line(target: Target, rows: list[Row]) -> str:
    """A target beside what was measured."""
    most = target.key == "milliseconds"
    wanted = f"at most {target.number:g} ms" if most else f"at least {target.number:g} {target.key}"
    found = [row[target.key] for row in rows if (row["group"], row["method"]) == target[:2] and target.key in row]
    cells = ["-", "not measured"]
    for measured in found:
        reached = measured <= target.number if most else measured >= target.number
        cells = [f"{measured:.3g}", "pass" if reached else "MISS"]
    return "| " + " | ".join([f"{target.group}: {target.method}", wanted, *cells]) + " |"
