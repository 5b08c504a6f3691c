"""Runs the benchmarks, prints a table, and writes it with the environment to a JSON and a Markdown file."""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def store(path: Path, report: dict[str, Any], table: str) -> str:
    """Writes a report and its table to ``path`` with the endings .json and .md, and returns the table."""
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    return table


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def collect(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method, with its time and memory as shares of its rival's in the same group."""
    rows = []
    for bench in raw["benchmarks"]:
        info, stats = bench["extra_info"], bench["stats"]
        rows.append(
            {
                "group": bench["group"],
                "method": info["method"],
                "seconds": stats["median"],
                "spread": stats["iqr"] / stats["median"],
                "rounds": stats["rounds"],
                "megabytes": info["extra_bytes"] / 2**20,
                "error": info["error"],
                "is_rival": info["method"] == info["rival"],
            }
        )
    for row in rows:
        rival = next(other for other in rows if other["group"] == row["group"] and other["is_rival"])
        row["time_ratio"] = row["seconds"] / rival["seconds"]
        row["memory_ratio"] = row["megabytes"] / rival["megabytes"] if rival["megabytes"] else None
    return rows


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"{where['date']}, {where['processor']} ({where['instructions']}), {where['threads']} threads, "
        f"torch {where['torch']}. Median time, its interquartile range, peak memory beyond inputs (and the gradient), "
        "relative error; shares of the first row's.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [
            "",
            f"## {group}",
            "",
            "| method | time | spread | share | memory | share | error |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in sorted((r for r in rows if r["group"] == group), key=lambda r: not r["is_rival"]):
            memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
            time = f"{1e3 * row['seconds']:.3g} ms | {100 * row['spread']:.0f}% | {row['time_ratio']:.3f}"
            lines.append(f"| {row['method']} | {time} | {row['megabytes']:.1f} MB | {memory} | {row['error']:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("-k", metavar="NAMES", default="", help="only benchmarks whose names match, as for pytest")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for cpu.json and cpu.md")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"--out: expected a folder that can be written, got {options.out} ({error.strerror})\n")
    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        arguments = [str(HERE), "-q", "-k", options.k, f"--benchmark-json={report}", "--benchmark-disable-gc"]
        status = int(pytest.main([*arguments, "--benchmark-columns=median,iqr,rounds"]))
        if status:
            return status  # a failed correctness check: nothing is written
        rows = collect(json.loads(report.read_text()))
    print(store(options.out / "cpu", {"environment": where, "results": rows}, markdown(rows, where)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
