"""`python -m benchmarks`: every benchmark in turn, and a table of their verdicts in `benchmarks/results.md`."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parent
SLOW = ("direction_getters", "scaling")  # trainings, and a process for every point
PACKAGES = (
    *("torch", "numpy", "orbax-checkpoint", "h5py", "dipy", "comet_ml"),
    *("jax", "optax", "flax", "lightning", "pytorch-ignite"),
)


def main() -> int:
    """Run the benchmarks, each as it stands in its own process. Exit code 1 when a requirement fails."""
    names = [path.stem for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()]
    names = [name for name in names if name != "__main__"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which (default: all but {', '.join(SLOW)}): {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="also those that take many minutes")
    parser.add_argument("--out", type=Path, default=FOLDER / "results.md", help="where the table goes")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}. There are: {', '.join(names)}")
    chosen = options.names or [name for name in names if options.all or name not in SLOW]
    rows, failed = [], False
    for name in chosen:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        output, code = run(name)
        minutes = (time.monotonic() - started) / 60
        failed |= code != 0
        lines = [line for line in output.splitlines() if line.startswith(("pass", "FAIL", "skip"))]
        rows += [f"| {name} | {line.replace('|', '/')} |" for line in lines]
        rows.append(f"| {name} | exit code {code}, {minutes:.1f} minutes |")
    options.out.write_text(describe(rows))
    print(f"\n{options.out}")
    return int(failed)


def run(name: str) -> tuple[str, int]:
    """Run one, showing its output as it comes; returns output and exit code."""
    command = [sys.executable, "-u", str(FOLDER / f"{name}.py")]
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    return "".join(output), process.returncode


def describe(rows: Sequence[str]) -> str:
    """The table, with what computed it."""
    installed = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    heading = [
        "# Results of `python -m benchmarks`",
        "",
        f"{datetime.date.today()}, {_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {', '.join(installed)}.",
        "",
        "| benchmark | verdict |",
        "|---|---|",
    ]
    return "\n".join([*heading, *rows]) + "\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
