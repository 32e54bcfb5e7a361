"""The tractography benchmark, `dwiml-func benchmark`, with requirements: that it tells trackers apart, and ours tracks.

`--bench FOLDER` keeps data, experiments and leaderboard, and continues what is there. Other options are those of the
command: `--setting full`, `--people sub_1 sub_2`, `--seeds 1`, `--max-epochs 20`, `-j 2`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from verdicts import conclude

from dwiml_func.cli.main import main as dwiml_func
from dwiml_func.experiment.tracking.case import ORACLE, PRINCIPAL_DIRECTION

DATA, OURS = "crossings", "learn2track"
LEAST_DISTANCE, LEAST_COVERED = 0.3, 0.2


def main() -> int:
    """Run the benchmark. Exit code 1 if the oracle is not far above the principal direction, or ours not between."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, help="keep all in this folder")
    options, others = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        folder = options.bench or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        code = dwiml_func(["benchmark", str(folder), *others])
        if code != 0:
            return code
        rows = [json.loads(line) for line in (folder / "leaderboard.jsonl").read_text().splitlines()]
    found = {row["tracker"]: row for row in rows if row["data"] == DATA}
    distance = found[ORACLE]["valid"]["all"] - found[PRINCIPAL_DIRECTION]["valid"]["all"]
    covered = found[OURS]["coverage"]["all"]
    text = f"valid streamlines: the oracle is {distance:.2f} above the principal direction"
    return conclude(
        [
            (distance >= LEAST_DISTANCE, f"{text}, at least {LEAST_DISTANCE} required"),
            (covered >= LEAST_COVERED, f"our recipe covers {covered:.2f} of it, at least {LEAST_COVERED} required"),
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
