"""Forged records, on demand: `python tests/forgeries.py --number 100`. The suite has one of each kind.

A small run is copied and forged: weights, metrics, options, data, the order of epochs, or a whole tail that nobody
trained. The forger writes all digests, histories and the best model again, so that what was recorded is consistent. The
audit must find each forgery by training again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dwiml_func.checkpoint.arrays import load_leaves, save_leaves
from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.digest import combine_digests, leaf_digest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.checkpoint.manifest import read_manifest
from dwiml_func.experiment.audit.audit import Audit, audit_experiment
from dwiml_func.experiment.audit.ensemble import audit_ensemble
from dwiml_func.experiment.best_model import repair_best_model
from dwiml_func.experiment.folder import is_ensemble, read_config
from dwiml_func.experiment.setup import prepare

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
OPTIONS = ("--rnn-layer-sizes", "8", "--batch-size-training", "40", "--reverse-ratio", "0.5")
OPTIONS = (*OPTIONS, "--dg-dropout", "0.2", "--keep", "all", "--clip-grad", "0.1", "--skip-figures")

RUNS: dict[str, tuple[str, ...]] = {
    "single": (),
    "fork": (),
    "shards": ("--num-shards", "4", "--num-threads", "2"),
    "bf16": ("--precision", "bf16"),
    "compiled": ("--compile",),
    "ensemble": ("--num-models", "2"),
}
"""Options of each kind of run."""

Record = dict[int, dict[str, Any]]
"""Checkpoints by epoch: `leaves`, and what stands in the manifest."""


def train(folder: Path, kind: str = "single", *, epochs: int = 4) -> Path:
    """The run that is forged, in `folder/run`, with its data beside it."""
    from dwiml_func.cli.main import main

    data = shutil.copy(PHANTOM, folder / "data.hdf5")
    name = "source" if kind == "fork" else "run"
    assert (
        main(["train", str(folder), name, str(data), *OPTIONS, "--max-epochs", str(epochs), *RUNS[kind], "--quiet"])
        == 0
    )
    if kind == "fork":
        assert main(["fork", str(folder / name), "run", "--from", "1", "--weight-decay", "0.03", "--quiet"]) == 0
    return folder / "run"


def audit(run: Path) -> Audit:
    """The audit of a run or an ensemble."""
    return audit_ensemble(run) if is_ensemble(run) else audit_experiment(run)


def read_checked(run: Path) -> Record:
    """All checkpoints of a run but that which it was forked from."""
    origin = read_config(run).origin
    first = 0 if origin is None else int(origin.checkpoint)
    paths = {int(name): run / "checkpoint" / name for name in list_checkpoints(run) if int(name) > first}
    return {epoch: {**read_manifest(path), "leaves": load_leaves(path)} for epoch, path in paths.items()}


def write_checked(run: Path, record: Record, hdf5_file: Path) -> None:
    """Write all checkpoints with digests and histories that fit, and the best model of them."""
    digests = {}
    for epoch, facts in sorted(record.items()):
        leaves = {name: leaf_digest(leaf) for name, leaf in facts["leaves"].items()}
        digests[epoch] = combine_digests(leaves, facts["numbers"])
    for epoch, facts in record.items():
        history = [row | {"digest": digests.get(row["epoch"], row["digest"])} for row in facts["history"]]
        kept = {name: facts[name] for name in ("config", "data", "environment")}
        save_leaves(
            run / "checkpoint" / str(epoch), facts["leaves"], {**kept, "history": history}, numbers=facts["numbers"]
        )
    shutil.rmtree(run / "best_model")
    latest = newest(run)
    assert latest is not None
    config = record[max(record)]["config"] | {"hdf5_file": str(hdf5_file)}
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    repair_best_model(run, latest.state, prepare(read_config(run)))
    assert (run / "best_model").is_dir()


def forge_weights(record: Record, data: Path, draws: random.Random) -> str:
    """One value of one checkpoint, by one ulp."""
    epoch = draws.choice(sorted(record))
    name = draws.choice(sorted(record[epoch]["leaves"]))
    flat = record[epoch]["leaves"][name].view(-1)
    index = draws.randrange(len(flat))
    flat[index] = torch.nextafter(flat[index], torch.tensor(torch.inf))
    return f"{name}[{index}] of checkpoint {epoch}"


def forge_metric(record: Record, data: Path, draws: random.Random) -> str:
    """One metric of one epoch by one ulp, in all histories."""
    epoch, subset = draws.choice(sorted(record)), draws.choice(("train", "valid"))
    name = draws.choice(sorted(record[epoch]["history"][-1][subset]))
    for facts in record.values():
        for row in facts["history"]:
            if row["epoch"] == epoch:
                row[subset][name] = float(np.nextafter(row[subset][name], -np.inf))
    return f"{subset}.{name} of epoch {epoch}"


def forge_config(record: Record, data: Path, draws: random.Random) -> str:
    """One option that changes this run, in all configs."""
    part, name, value = draws.choice(
        [
            ("training", "learning_rate", ["0.0010001"]),
            ("training", "weight_decay", 0.02),
            ("training", "clip_grad", 0.05),
            ("training", "rng", 4321),
            ("training", "optimizer", "RAdam"),
            ("model", "dg_dropout", 0.1),
            ("batches", "reverse_ratio", 0.25),
            ("batches", "batch_size_training", 30),
            ("batches", "noise_gaussian_size_loss", 0.01),
        ]
    )
    for facts in record.values():
        assert name in facts["config"][part]
        facts["config"][part][name] = value
    return f"{name} {value}"


def forge_data(record: Record, data: Path, draws: random.Random) -> str:
    """The highest bit of the mantissa of one coordinate of a training streamline, and the recorded hash of the data."""
    with h5py.File(data, "r+") as file:
        subject = draws.choice([str(name) for name in np.asarray(file.attrs["training_subjs"]).astype(str)])
        points = file[f"{subject}/streamlines/data"]
        assert isinstance(points, h5py.Dataset)
        values = points[:]
        row, column = draws.randrange(len(values)), draws.randrange(3)
        values.view(np.int32)[row, column] ^= 1 << 22
        points[:] = values
    found = {"sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "size": data.stat().st_size}
    for facts in record.values():
        facts["data"] |= found
    return f"coordinate {column} of point {row} of {subject}"


def forge_order(record: Record, data: Path, draws: random.Random) -> str:
    """Two epochs change places: their states, and their reports in all histories."""
    one, other = draws.sample(sorted(record), 2)
    record[one]["leaves"], record[other]["leaves"] = record[other]["leaves"], record[one]["leaves"]
    rows = {row["epoch"]: copy.deepcopy(row) for row in record[max(record)]["history"]}
    for facts in record.values():
        for row in facts["history"]:
            if row["epoch"] in (one, other):
                there = rows[other if row["epoch"] == one else one]
                row |= {name: there[name] for name in ("train", "valid")}
    return f"epochs {one} and {other}"


def forge_tail(record: Record, data: Path, draws: random.Random) -> str:
    """All states from an epoch on, which nobody trained: the state before it, a little further each time."""
    first = draws.choice(sorted(record)[1:])
    generator = torch.Generator().manual_seed(draws.randrange(1 << 30))
    for epoch in range(first, max(record) + 1):
        before = record[epoch - 1]["leaves"]
        record[epoch]["leaves"] = {
            name: leaf * (1 + 1e-3 * torch.randn(leaf.shape, generator=generator)) if leaf.is_floating_point() else leaf
            for name, leaf in before.items()
        }
    return f"epochs {first} to {max(record)}"


FORGERIES: dict[str, Callable[[Record, Path, random.Random], str]] = {
    "weights": forge_weights,
    "metric": forge_metric,
    "config": forge_config,
    "data": forge_data,
    "order": forge_order,
    "tail": forge_tail,
}


def forged(run: Path, folder: Path, kind: str, draws: random.Random) -> tuple[Path, str]:
    """A copy of a run in `folder`, forged, and what was forged."""
    copied = Path(shutil.copytree(run, folder / "run"))
    one = copied / draws.choice("01") if is_ensemble(run) else copied
    data = Path(shutil.copy(read_config(one).hdf5_file, folder / "data.hdf5"))
    record = read_checked(one)
    what = FORGERIES[kind](record, data, draws)
    write_checked(one, record, data)
    return copied, what


def main() -> int:
    """Forge and audit; returns how many forgeries the audit did not find."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", choices=list(RUNS), default="single", help="the kind of run that is forged")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draws, missed, began = random.Random(options.seed), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        run = train(Path(temporary), options.run)
        assert not audit(run).problems
        for number in range(options.number):
            kind = list(FORGERIES)[number % len(FORGERIES)]
            folder = Path(temporary, str(number))
            folder.mkdir()
            copied, what = forged(run, folder, kind, draws)
            problems = audit(copied).problems
            missed += not problems
            print(f"{number + 1} {kind}: {what}: {problems[0][:110] if problems else 'NOT FOUND'}", flush=True)
            shutil.rmtree(folder)
    found = options.number - missed
    print(f"{found} of {options.number} forgeries found in {time.monotonic() - began:.0f} s")
    return missed


if __name__ == "__main__":
    sys.exit(main())
