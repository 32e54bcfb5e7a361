"""What all tests share: one thread, hypothesis without a clock and without chance, and a way to run commands."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start find the package compiled,
sys.dont_write_bytecode = False  # and the next run of the tests finds them compiled
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # or inductor tries for 8 s what the compiler knows of the processor
MEMORY = Path("/dev/shm")  # a disk needs a tenth of a second for each checkpoint, as its files are synced
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With `-n`, each worker takes neighbouring tests, so that few fixtures of modules are made twice."""
    if config.getoption("numprocesses", None) and config.getoption("dist", None) == "no":
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """With `-n auto`, one worker more than there are processors: tests of processes wait for these and for the disk."""
    return (os.cpu_count() or 1) + 1


def pytest_collection() -> None:
    """Not at the import: the process that only gives tests to workers does without torch, and they start sooner."""
    import torch
    import torch._dynamo  # it notes torch's functions when it is imported, which must not be while a test replaces some

    torch.set_num_threads(1)  # bits depend on the number of threads
    trace = logging.getLogger("torch.__trace")  # pytest listens to loggers that do not propagate, and where someone
    trace.handlers.clear()  # listens to this one, torch writes the text of all graphs
    trace.propagate = True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiles"):
        from dwiml_func.compiled._torch_private import missing

        if lacking := missing("eager"):
            pytest.skip(f"this torch cannot compile steps: {lacking}")


def pytest_collection_finish() -> None:
    """Look for garbage rarely, and never in the modules of all tests: it would take a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str

    def check_refusal(self, *named: str) -> None:
        """Exit code 2 and one line that names all of `named`, on standard error; nothing on standard output.

        A usage error may be a box of several lines instead, which tyro prints.
        """
        assert self.code == 2
        assert self.out == ""
        assert self.err.endswith("\n")
        text = self.err.strip()
        if text.startswith("╭"):
            text = " ".join(text.translate(dict.fromkeys(map(ord, "╭╮╰╯│─"), " ")).split())
        else:
            (text,) = text.splitlines()
            assert text.startswith("dwiml-func")
        for name in named:
            assert name in text


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command of `dwiml-func` in this process."""
    from dwiml_func.cli.main import main

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment `run`: best epoch 2, and stopped by a patience of 1 after epoch 3 of 9.

    Its data claim to be spherical harmonics, so that the summary has a principal direction.
    """
    import h5py

    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("stopped_early")
    data = shutil.copy(Path(__file__).parent / "data" / "phantom.hdf5", folder / "data.hdf5")
    with h5py.File(data, "r+") as file:
        for subject in ("subj0", "subj1", "subj2"):
            file[f"{subject}/input"].attrs["sh_order"] = 2
    options = ["--learning-rate", "0.01*2 1e-30", "--patience", "1", "--max-epochs", "9", "--rnn-layer-sizes", "8"]
    options += ["--batch-size-training", "40", "--batch-size-validation", "20", "--nb-previous-dirs", "1"]
    (folder / "experiments").mkdir()
    assert main(["train", str(folder / "experiments"), "run", str(data), *options]) == 0
    return folder / "experiments"


@pytest.fixture(scope="session")
def example_hdf5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in example data, to read only; with `-n`, one worker makes them for all."""
    from filelock import FileLock

    from dwiml_func.data.example.dataset import make_example_data

    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "example.hdf5"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make_example_data(path)
    return path


@pytest.fixture(scope="session")
def few_streamlines_hdf5(tmp_path_factory: pytest.TempPathFactory, example_hdf5: Path) -> Path:
    """The example data with every fifth streamline, to read only."""
    import h5py
    import numpy as np

    path = tmp_path_factory.mktemp("few_streamlines") / "data.hdf5"
    with h5py.File(example_hdf5) as source, h5py.File(path, "w") as file:
        file.attrs.update(source.attrs)
        for person in source:
            whole: Any = source[person]
            volume = file.create_group(f"{person}/input")
            volume.attrs.update(whole["input"].attrs)
            volume["data"] = whole["input/data"][:]  # not compressed: it is read dozens of times
            source.copy(whole["wm_mask"], file[person], "wm_mask")
            source.copy(whole["streamlines"], file[person], "streamlines")
            group: Any = file[f"{person}/streamlines"]
            lengths, ids = group["lengths"][:], group["bundle_ids"][:]
            kept = np.arange(len(lengths)) % 5 == 0
            of_points = np.repeat(kept, lengths)
            new = {"data": group["data"][:][of_points], "lengths": lengths[kept], "bundle_ids": ids[kept]}
            new["offsets"] = np.cumsum(new["lengths"]) - new["lengths"]
            for name, values in new.items():
                if name in group:
                    del group[name]
                    group.create_dataset(name, data=values)
    return path


@pytest.fixture
def experiments(stopped_early: Path, tmp_path: Path) -> Path:
    """A copy of `stopped_early` to work in."""
    return Path(shutil.copytree(stopped_early, tmp_path / "experiments"))
