"""Claims about sweeps over options that no ensemble can have: experiments of their own, one after the other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from experiment_cases import PHANTOM, contents, latest_digest

from dwiml_func.checkpoint.checkpoint import newest
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.cli import _several
from dwiml_func.cli.train import Options, run
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.folder import read_config
from dwiml_func.experiment.sweep import is_ensemble_sweep, sweep_configs
from dwiml_func.files.lock import experiment_lock

OPTIONS = (
    *("--rnn-layer-sizes", "4", "--batch-size-training", "60", "--batch-size-validation", "60", "--max-epochs", "2"),
    *("--learning-rate", "0.01", "--skip-figures", "--quiet"),
)
SWEEP = ("--sweep", "dg-key=cosine-regression,gaussian,l2-regression", "dropout=0.5")
NAMES = [f"dg-key={getter},dropout=0.5" for getter in ("cosine-regression", "gaussian", "l2-regression")]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A folder with the sweep `all`, and the experiment `alone`, of the last of its configs."""
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("sweeps")
    layers = ("--rnn-layer-sizes", "4", "3")
    assert main(["train", str(folder), "all", str(PHANTOM), *OPTIONS, *layers, *SWEEP]) == 0
    alone = ("--dg-key", "l2-regression", "--dropout", "0.5")
    assert main(["train", str(folder), "alone", str(PHANTOM), *OPTIONS, *layers, *alone]) == 0
    return folder


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "copied"))


def train(cli, folder: Path, *sweep: str):
    return cli("train", folder, "all", PHANTOM, *OPTIONS, "--rnn-layer-sizes", "4", "3", *(sweep or SWEEP))


def test_each_is_an_experiment_of_its_own_bitwise_that_of_train(swept: Path, cli) -> None:
    assert sorted(path.name for path in (swept / "all").iterdir() if path.is_dir()) == NAMES
    assert latest_digest(swept / "all" / NAMES[-1]) == latest_digest(swept / "alone")
    for part in ("config.json", "logs/valid_local_loss_monitor_per_epoch.npy"):
        assert (swept / "all" / NAMES[-1] / part).read_bytes() == (swept / "alone" / part).read_bytes()
    for name in NAMES:
        assert (swept / "all" / name / "evaluation.json").is_file()
    assert len({latest_digest(swept / "all" / name) for name in NAMES}) == 3


def test_it_ends_in_a_table_that_does_not_rank_by_losses_that_cannot_be_compared(copied: Path, cli) -> None:
    done = train(cli, copied)  # all have ended: only the table is left
    assert done.code == 0, done.err
    title, heading, *lines = done.out.strip().splitlines()
    assert title == f"{copied / 'all'}, the best by angular error first:"
    assert heading.split()[:4] == ["name", "state", "epochs", "best"]  # names say the options
    angle = heading.index("angle deg")
    angles = [float(line[angle : angle + len("angle deg")]) for line in lines]
    assert len(angles) == 3
    assert angles == sorted(angles)
    best = lines[0].split()[0]
    assert f"all/{best} (best of 3)" in cli("runs", copied).out


def test_a_killed_sweep_continues_by_the_same_command(copied: Path, swept: Path, cli) -> None:
    shutil.rmtree(copied / "all" / NAMES[-1])  # not begun
    for gone in ("checkpoint/2", "best_model"):  # within its second epoch
        shutil.rmtree(copied / "all" / NAMES[1] / gone)
    ended = contents(copied / "all" / NAMES[0])
    dry = train(cli, copied, *SWEEP, "--dry-run")
    assert [line.rpartition(": ")[2] for line in dry.err.splitlines()[1:4]] == [
        *("has ended", "to be resumed from checkpoint 1", "new")
    ]
    assert [config["model"]["dg_key"] for config in json.loads(dry.out)][1:] == ["gaussian", "l2-regression"]
    assert not (copied / "all" / NAMES[-1]).exists()
    assert train(cli, copied).code == 0
    for name in NAMES:
        assert latest_digest(copied / "all" / name) == latest_digest(swept / "all" / name)
    assert contents(copied / "all" / NAMES[0]) == ended  # those that have ended are left alone


def test_another_value_is_trained_beside_those_that_have_ended(copied: Path, cli) -> None:
    before = {name: contents(copied / "all" / name) for name in NAMES}
    done = train(cli, copied, "--sweep", "dg-key=cosine-regression,fisher-von-mises", "dropout=0.5")
    assert done.code == 0, done.err
    assert "dg-key=fisher-von-mises,dropout=0.5" in done.out
    assert {name: contents(copied / "all" / name) for name in NAMES} == before


def test_one_that_breaks_off_does_not_end_the_others(tmp_path: Path, cli) -> None:
    diverges = ("--optimizer", "SGD", "--dg-key", "l2-regression", "--learning-rate", "1e20")
    diverges = (*diverges, "--weight-decay", "0")
    done = cli("train", tmp_path, "all", PHANTOM, *OPTIONS, *diverges, "--sweep", "clip-grad=none,1e-22")
    assert done.code == 1
    assert "clip-grad=none ended with an error: " in done.out
    assert (tmp_path / "all" / "clip-grad=1e-22" / "evaluation.json").is_file()


def test_one_that_another_process_trains_is_passed_over(copied: Path, cli) -> None:
    running = copied / "all" / NAMES[1]
    for gone in ("checkpoint/2", "best_model"):
        shutil.rmtree(running / gone)
    with experiment_lock(running):
        done = cli("train", copied, "all", PHANTOM, *OPTIONS[:-1], "--rnn-layer-sizes", "4", "3", *SWEEP)
    assert done.code == 0, done.err
    assert f"[2/3] {NAMES[1]}: running in another process\n" in done.out
    assert f"[3/3] {NAMES[2]}: has ended\n" in done.out
    assert list_checkpoints(running) == ["1"]


def test_one_has_ended_where_it_has_all_epochs_or_no_patience_is_left_and_all_its_files(copied: Path, monkeypatch):
    folder = copied / "all" / NAMES[0]  # whose best epoch is the first of two

    def has_ended(**options: int) -> bool:
        config = read_config(folder)
        return _several._has_ended(folder, replace(config, training=replace(config.training, **options)))

    record = newest(folder)
    assert record is not None
    assert record.history[-1].best.num_bad_epochs == 1
    assert has_ended()
    assert not has_ended(max_epochs=3)
    assert has_ended(max_epochs=3, patience=1)
    assert not has_ended(max_epochs=3, patience=2)
    within = (*record.history[:-1], replace(record.history[-1], batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(_several, "newest", lambda _: replace(record, history=within))
        assert not has_ended()
        patch.setattr(_several, "newest", lambda _: replace(record, history=()))
        assert not has_ended()
    (folder / "evaluation.json").unlink()
    assert not has_ended()
    assert not _several._has_ended(copied / "nothing", read_config(folder))


def test_what_is_wrong_with_the_last_shows_before_the_first_is_trained(tmp_path: Path, cli) -> None:
    train = ("train", tmp_path, "all", PHANTOM, *OPTIONS, "--sweep", "input-group-name=input,no_such")
    cli(*train).check_refusal("'no_such'")
    assert not any(tmp_path.iterdir())


def test_values_are_read_as_the_options_are() -> None:
    config = RunConfig(hdf5_file="a")
    texts = ["rnn-layer-sizes=5,6 4", "patience=none,3", "use_skip_connection=true", "step-size=0.5", "keep=all,3"]
    found = sweep_configs(config, sweep=[*texts, "learning-rate=0.1*2 0.01"])
    assert len(found) == 8
    name, last = list(found.items())[-1]
    assert name == (
        "rnn-layer-sizes=6_4,patience=3,use-skip-connection=true,step-size=0.5,keep=3,learning-rate=0.1_2_0.01"
    )
    assert last.model.rnn_layer_sizes == (6, 4)
    assert last.model.use_skip_connection is True
    assert (last.training.patience, last.batches.step_size, last.checkpoints.keep) == (3, 0.5, 3)
    assert last.training.learning_rate == ("0.1*2", "0.01")
    assert next(iter(found.values())).training.patience is None
    seeds = sweep_configs(config, num_models=2, sweep=["dropout=0.1"])
    assert [(own.training.rng, own.training.data_rng) for own in seeds.values()] == [(1234, 1234), (1235, 1234)]
    assert [is_ensemble_sweep([text]) for text in ("learning-rate=1", "weight_decay=1", "rng=1", "ema=0.9")] == [
        *(True, True, True, False)
    ]


def test_a_sweep_has_at_most_10_000_members() -> None:
    config, sweep = RunConfig(hdf5_file="a"), ["dropout=" + ",".join(f"0.{number:04}" for number in range(73))]
    with pytest.raises(ValueError, match="at most 10000 members"):
        sweep_configs(config, num_models=137, sweep=sweep)  # 73 x 137


def test_a_sweep_of_a_single_value_has_it(tmp_path: Path, cli) -> None:
    dry = cli("train", tmp_path, "one", PHANTOM, *OPTIONS, "--sweep", "weight-decay=0.25", "--dry-run")
    assert json.loads(dry.out)["training"]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        (["drop-out=0.1"], ["'drop-out'", "Did you mean dropout"]),
        (["dropout=0.1,x"], ["dropout", "received 'x'"]),
        (["dropout=0.1,"], ["NAME=VALUE,VALUE,...", "'dropout=0.1,'"]),
        (["dropout=0.1", "dropout=0.2"], ["each NAME once"]),
        (["dropout=0.1,0.1"], ["different values"]),
        (["rng=1,1"], ["different values"]),
        (["dg-key=cosine"], ["dg-key", "received 'cosine'"]),
        (["patience=0,1"], ["patience=0"]),
        (["dg-key=gaussian", "add-entropy-to-gauss=x"], ["add-entropy-to-gauss", "'x'"]),
    ],
)
def test_what_is_no_sweep_is_refused_before_anything_is_written(tmp_path: Path, cli, sweep, named) -> None:
    cli("train", tmp_path, "all", PHANTOM, *OPTIONS, "--sweep", *sweep).check_refusal("--sweep", *named)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("values", "is_told"), [("0,0.5", True), ("0.5,0", True), ("0,0.0", False)])
def test_a_dropout_that_drops_nothing_in_one_of_a_sweep_is_told(monkeypatch, caplog, tmp_path, values, is_told):
    monkeypatch.setattr("dwiml_func.cli.train.describe_run", lambda *_: "")
    monkeypatch.setattr("dwiml_func.cli.train.prepare", lambda _: None)
    options = (*OPTIONS, "--nb-previous-dirs", "0", "--sweep", f"dropout={values}", "--dry-run")
    parsed = Options.parse([str(tmp_path), "all", str(PHANTOM), *options], "train")
    assert run(parsed) == 0
    assert ("--dropout changes nothing" in caplog.text) is is_told


def test_another_experiment_is_not_overwritten(copied: Path, cli) -> None:
    (copied / "all").rename(copied / "moved")
    (copied / "alone").rename(copied / "all")
    train(cli, copied).check_refusal("'all' exists", "Choose another name")
    cli("resume", copied, "moved").check_refusal("is a sweep", "train command again")
    (copied / "all").rename(copied / "alone")
    (copied / "moved").rename(copied / "all")
    train(cli, copied, *SWEEP, "--weight-decay", "0.5").check_refusal("another config", "weight_decay")


def test_a_resume_says_where_it_resumes(copied: Path, cli) -> None:
    resumed = cli("resume", copied, "alone", "--new-max-epochs", "3")
    assert "Resuming from checkpoint 2: next is epoch 3.\n" in resumed.out
