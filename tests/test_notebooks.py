"""The notebooks run, each in a process of its own, as they stand, but for one epoch of training.

The first run has fewer streamlines and seeds.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from preloaded import run_program

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ("first_run", "own_data", "own_model")
# `!command` as a notebook does it, but in this process, and a command that fails ends the notebook.
START = """
import shlex, subprocess, sys, types
import matplotlib
matplotlib.use("agg")
from pathlib import Path
from dwiml_func.cli.main import main
from dwiml_func.tracking import protocols

protocols.NUM_FREE, protocols.NUM_CORE = 20, 60

def shell(line):
    words = shlex.split(line)
    code = main(words[1:]) if words[0] == "dwiml-func" else subprocess.run(line, shell=True).returncode
    assert code == 0, line

def image(file, width):
    assert Path(file).read_bytes().startswith(b"\\x89PNG"), file

sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].Image = image
"""


def _cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]


def _program(name: str) -> str:
    text = "\n".join("".join(cell["source"]) for cell in _cells(name))
    text = re.sub(r"^!(.*)$", lambda found: f"shell({found[1]!r})", text, flags=re.MULTILINE)
    return START + re.sub(r"(--max-epochs |MAX_EPOCHS = )\d+", r"\g<1>1", text)


def test_these_are_the_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name: str, tmp_path: Path, example_hdf5: Path, few_streamlines_hdf5: Path) -> None:
    if name != "own_data":  # not made again
        (tmp_path / "experiments").mkdir()
        data = few_streamlines_hdf5 if name == "first_run" else example_hdf5
        shutil.copy(data, tmp_path / "experiments" / "example_data.hdf5")
    printed = run_program(_program(name), folder=tmp_path)
    for expected in {
        "first_run": ("is bitwise identical to the recorded epoch", "1 epochs; last window lag"),
        "own_data": ("No problem found.", "upper.trk: "),
        "own_model": ("epoch 1: validation loss 0.", "beside 150 real ones of sub_5"),
    }[name]:
        assert expected in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_it_printed_with_one_bar_at_most(name: str) -> None:
    outputs = [output for cell in _cells(name) for output in cell["outputs"]]
    texts = ["".join(output.get("text", "")) for output in outputs]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "".join(texts).count("%|") <= 1
    assert max(len(text.splitlines()) for text in texts) < 40
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
