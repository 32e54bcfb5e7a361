"""`python -m benchmarks`: every benchmark in turn, and a table of their verdicts in `benchmarks/results.md`."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SLOW = (
    "direction_getters",
    "gpu",
    "scaling",
    "tracking_correlation",
    "tractography",
    "speedrun",
)  # trainings, a GPU, a process for every point
MORE = {  # what `--all` asks for beside
    "data_path": ("--lazy-gb", "4"),
    "scaling": ("--figure", str(FOLDER / "scaling.png")),
}
PACKAGES = (
    *("torch", "numpy", "orbax-checkpoint", "h5py", "dipy", "comet_ml"),
    *("jax", "optax", "flax", "lightning", "pytorch-ignite"),
)
_VERDICT = re.compile(
    r"(pass|FAIL|skip): (.*?)(?:[,;] ((?:at most|at least|must) .*?)(?: is)?(?: required| allowed)?)?$"
)


def main() -> int:
    """Run the benchmarks, each as it stands in its own process. Exit code 1 unless every requirement was met."""
    names = scripts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which (default: all but {', '.join(SLOW)}): {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="also what takes many minutes, or 4 GB on the disk")
    parser.add_argument(
        "--out",
        type=Path,
        help="where the results go (default: benchmarks/results.md; nowhere if only some are chosen)",
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}. There are: {', '.join(names)}")
    chosen = options.names or [name for name in names if options.all or name not in SLOW]
    out = options.out or (None if options.names else FOLDER / "results.md")

    results = [run(name, MORE.get(name, ()) if options.all else ()) for name in chosen]
    table = tabulate(results)
    print(f"\n{table}")
    if out is not None:
        out.write_text(describe(results, table), encoding="utf-8")
        print(f"\n{out}")
    return int(not all(verdict == "pass" for result in results for *_, verdict in result.rows()))


def scripts() -> list[str]:
    """The names of all benchmarks: files that do something when they are run."""
    paths = [path for path in sorted(FOLDER.glob("*.py")) if 'if __name__ == "__main__"' in path.read_text()]
    return [path.stem for path in paths if path.name != "__main__.py"]


class Result(NamedTuple):
    """What a benchmark printed, warnings and errors included, and how it ended."""

    name: str
    output: str
    code: int
    minutes: float

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, the limit, the verdict: of each requirement, and of a script that ended without any."""
        found = [_VERDICT.match(line) for line in self.output.splitlines()]
        names = {"skip": "not measured"}
        rows = [(m[2], m[3] or "", names.get(m[1], m[1])) for m in found if m is not None]
        if self.code != int(any(verdict == "FAIL" for *_, verdict in rows)):
            last = next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output")
            rows.append((f"exit code {self.code}: {last.strip()}", "", "did not finish"))
        return rows


def run(name: str, arguments: Sequence[str]) -> Result:
    """Run one, showing its output as it comes."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, "-u", str(FOLDER / f"{name}.py"), *arguments]
    output, started = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line)
    return Result(name, "".join(output), process.returncode, (time.monotonic() - started) / 60)


def tabulate(results: list[Result]) -> str:
    """A row for each requirement."""
    rows = ["| benchmark | measured | limit | verdict |", "|---|---|---|---|"]
    for result in results:
        for cells in result.rows() or [("no requirement", "", "")]:
            rows += ["| " + " | ".join(cell.replace("|", "/") for cell in (f"`{result.name}`", *cells)) + " |"]
    return "\n".join(rows)


def describe(results: list[Result], table: str) -> str:
    """What computed them and when, the table, and all that they printed."""
    installed = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    minutes = sum(result.minutes for result in results)
    parts = [
        "# Results of `python -m benchmarks`",
        f"{datetime.date.today()}, {_processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {', '.join(installed)}; {minutes:.1f} minutes in all.",
        table,
    ]
    for result in results:
        output = result.output.replace(str(FOLDER.parent) + os.sep, "").strip()
        parts += [f"## `{result.name}.py`: {result.minutes:.1f} minutes", f"```text\n{output}\n```"]
    return "\n\n".join(parts) + "\n"


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
