"""Damaged experiments, on demand: `python tests/damages.py --seconds 300`. Not part of the suite, which has few.

One file of an experiment's folder at a time is cut, emptied, altered by a bit, or replaced by a folder, a pipe or a
broken link. Then a command reads or continues the experiment: its result is that of the whole experiment, or it says
what is wrong, in one line and with exit code 2. Tractograms, digests and resumed states are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from preloaded import start_command
from reproduction_cases import DATA, WITH_FIGURES

KINDS = ("empty", "half", "bit", "junk", "gone", "folder", "pipe", "link", "other JSON")
SILENT = ("runs", "plot", "page")
"""Their results have times and figures in them, and are not compared."""


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """The commands by name; a resume trains an epoch more."""
    run, out = folder / "run", folder / "out"
    return {
        "digest": ("digest", run),
        "runs": ("runs", folder),
        "card": ("card", run),
        "diff": ("diff", run, folder / "other"),
        "plot": ("plot", run, "--out", f"{out}.png"),
        "page": ("page", run, f"{out}.html"),
        "evaluate": ("evaluate", run, DATA),
        "verify": ("verify", run),
        "resume": ("resume", folder, "run", "--new-max-epochs", 4),
        "fork": ("fork", run, "forked", "--max-epochs", 4),
        "track": ("track", run, DATA, f"{out}.trk", "--subject", "subj0", "--nt", 3, "--step-size", 1),
        "export": ("export-dwi-ml", run, out),
    }


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Put something else in a file's place."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/nowhere/at all")
    elif kind != "gone":
        if kind == "bit" and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        others = {"empty": b"", "half": content[: len(content) // 2], "junk": rng.randbytes(300), "other JSON": b"{}"}
        path.write_bytes(others.get(kind, content))


def result(folder: Path, name: str) -> tuple[int, str, str]:
    """Give a command: its exit code, what it told of errors, and what it made."""
    process = start_command(*commands(folder)[name])
    try:
        code = process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, "it waits for ever", ""
    tractogram, made = folder / "out.trk", "" if name in SILENT else process.out.replace(str(folder), "")
    if name in ("resume", "fork") and code == 0:
        digest = start_command("digest", folder / ("run" if name == "resume" else "forked"))
        made = digest.out if digest.wait(120) == 0 else digest.err
    if tractogram.exists():
        made = tractogram.read_bytes().hex()
    return code, process.err.replace(str(folder), ""), made


def main() -> int:
    """Damage until the time is over; returns the number of wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, num_tried, num_told, num_wrong = random.Random(options.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        source.mkdir()
        begin = ("train", source, "run", DATA, *WITH_FIGURES, "--max-epochs", 3, "--keep", "all")
        assert start_command(*begin).wait(300) == 0
        shutil.copytree(source / "run", source / "other")
        files = sorted(path.relative_to(source) for path in (source / "run").rglob("*") if path.is_file())

        def fresh(number: int) -> Path:
            return Path(shutil.copytree(source, Path(temporary, "tried", str(number))))

        whole = {name: result(fresh(-1 - number), name) for number, name in enumerate(commands(source))}
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            path, kind, name = rng.choice(files), rng.choice(KINDS), rng.choice(list(whole))
            folder, num_tried = fresh(num_tried), num_tried + 1
            damage(folder / path, kind, rng)
            code, told, made = result(folder, name)
            lines = [line for line in told.splitlines() if "warning:" not in line.lower()]
            is_refusal = code in (1, 2) and len(lines) <= 1 and "Traceback" not in told and bool(told or made)
            num_told += bool(told)
            if not is_refusal and not (code == whole[name][0] == 0 and not lines and (told or made == whole[name][2])):
                num_wrong += 1
                print(f"{path} ({kind}), {name}: exit code {code}, {told[-400:]}", flush=True)
            shutil.rmtree(folder)
    print(f"{num_tried} damages: {num_told} told, {num_wrong} wrong, the others without effect")
    return min(num_wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
