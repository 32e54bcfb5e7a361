"""Claims about the end of a run: evaluation and figure are those of its last epoch, or are made good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from experiment_cases import PHANTOM, contents

from dwiml_func.experiment import finish
from dwiml_func.experiment.figures.autoencoder import save_autoencoder_figures
from dwiml_func.experiment.figures.tracking import save_tracking_figures
from dwiml_func.experiment.finish import is_whole
from dwiml_func.models.autoencoder.autoencoder import Autoencoder

OPTIONS = ("--rnn-layer-sizes", 4, "--batch-size-training", 96, "--batch-size-validation", 48, "--learning-rate", 0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dwiml_func.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(folder), "run", str(PHANTOM), *map(str, OPTIONS), "--max-epochs", "2"]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


EVALUATION, FIGURE = "evaluation.json", "plots/training.png"


@pytest.mark.parametrize("missing", [(EVALUATION, FIGURE), (EVALUATION,), (FIGURE,)], ids=str)
def test_what_a_kill_after_the_last_checkpoint_left_out_is_made_by_a_resume(cli, run, missing):
    before = contents(run)
    for name in missing:
        (run / name).unlink()
    done = cli("resume", run.parent, "run")
    assert (done.code, done.err) == (0, "")
    assert "Nothing is left to train." in done.out
    assert "Resuming from" not in done.out
    after = contents(run)
    assert after.keys() == before.keys()
    assert after[EVALUATION] == before[EVALUATION]
    assert after["checkpoint/2/manifest.json"] == before["checkpoint/2/manifest.json"]
    cli("resume", run.parent, "run").check_refusal("No epoch is left to train")


def test_the_evaluation_of_an_earlier_end_is_made_again(cli, run):
    """As when a run with more epochs is killed before its end."""
    old = {name: (run / name).read_bytes() for name in (EVALUATION, FIGURE)}
    assert cli("resume", run.parent, "run", "--new-max-epochs", 3).code == 0
    new = {name: (run / name).read_bytes() for name in old}
    for name, content in old.items():
        (run / name).write_bytes(content)
    assert not is_whole(run)
    assert cli("resume", run.parent, "run").code == 0
    assert is_whole(run)
    assert (run / EVALUATION).read_bytes() == new[EVALUATION] != old[EVALUATION]


@pytest.mark.parametrize("skip_figures", [True, False])
@pytest.mark.parametrize("tracked", [None, "no lines", "lines"])
@pytest.mark.parametrize("of_autoencoder", [True, False])
def test_a_run_ends_with_its_evaluations_and_figures(tmp_path, monkeypatch, skip_figures, tracked, of_autoencoder):
    calls: list[Any] = []

    def replace_all(**results: Any) -> None:
        for name, result in results.items():
            call = lambda *given, name=name, result=result, **facts: calls.append((name, given, facts)) or result  # noqa: E731
            monkeypatch.setattr(finish, name, call)

    module = Autoencoder.__new__(Autoencoder) if of_autoencoder else "the model"
    tracking = (
        None if tracked is None or of_autoencoder else SimpleNamespace(lines=None if tracked == "no lines" else "all")
    )
    replace_all(
        load_model=SimpleNamespace(module=module), evaluate_reconstruction="of lines", evaluate_best_model="of angles",
        evaluate_tracking=tracking, write_evaluation=None, write_tracking_evaluation=None, write_tracked_lines=None,
        save_run_figure=None, save_autoencoder_figures=None, save_tracking_figures=None,
    )  # fmt: skip
    evaluated = SimpleNamespace(subset="validation")
    config = SimpleNamespace(logging=SimpleNamespace(skip_figures=skip_figures))
    parts: Any = SimpleNamespace(config=config, data=SimpleNamespace(evaluation=evaluated))
    history: Any = [SimpleNamespace(epoch=5, best=SimpleNamespace(epoch=4))]
    (tmp_path / "plots").mkdir()
    old = [tmp_path / "plots" / name for name in ("training.png", "tracking.npz", "mine.png")]
    for path in old:
        path.touch()
    evaluation = "of lines" if of_autoencoder else "of angles"
    assert finish.finish_run(tmp_path, parts, history) == (evaluation, tracking)
    facts = {"epoch": 4, "subset": "validation", "num_epochs": 5}
    expected: list[Any] = [("load_model", (tmp_path / "best_model",), {})]
    if of_autoencoder:
        expected.append(("evaluate_reconstruction", (module, parts), {}))
    else:
        expected.append(("evaluate_best_model", (module, parts), {}))
        expected.append(("evaluate_tracking", (module, evaluated, config), {}))
    if tracking is not None:
        expected.append(("write_tracking_evaluation", (tmp_path, tracking), {"epoch": 4}))
        if tracking.lines is not None:
            expected.append(("write_tracked_lines", (tmp_path, "all"), {"epoch": 4}))
    expected.append(("write_evaluation", (tmp_path, evaluation), facts))
    if not skip_figures:
        if of_autoencoder:
            expected.append(("save_autoencoder_figures", (tmp_path, module, parts), {}))
        elif tracking is not None:
            expected.append(("save_tracking_figures", (tmp_path, tracking), {"epoch": 4}))
        expected.append(("save_run_figure", (tmp_path,), {}))
    assert calls == expected
    assert [path.exists() for path in old] == [False, False, True]


@pytest.mark.parametrize(
    ("save", "told"),
    [
        (lambda run: save_autoencoder_figures(run, cast(Any, None), cast(Any, None)), ""),
        (lambda run: save_tracking_figures(run, cast(Any, None), epoch=1), " of tracking"),
    ],
)
def test_figures_that_cannot_be_drawn_are_a_warning(tmp_path, caplog, save: Callable[[Path], None], told: str) -> None:
    save(tmp_path)
    [record] = caplog.records
    assert record.getMessage().startswith(
        f"The figures{told} of {tmp_path} were not drawn: 'NoneType' object has no attribute"
    )


def test_without_figures_a_run_is_whole_and_plot_draws_them(cli, tmp_path):
    train = ("train", tmp_path, "run", PHANTOM, *OPTIONS, "--max-epochs", 1)
    assert cli(*train, "--skip-figures").code == 0
    run = tmp_path / "run"
    assert (run / EVALUATION).is_file()
    assert not list(run.glob("plots/*"))
    assert is_whole(run)
    assert cli("evaluate", run, "--write").code == 0
    assert not list(run.glob("plots/*"))
    assert cli("plot", run).out == f"{run / FIGURE}\n"


def test_evaluate_writes_them_at_any_time(cli, run):
    before = contents(run)
    for name in (EVALUATION, FIGURE):
        (run / name).unlink()
    done = cli("evaluate", run, "--write")
    assert (done.code, done.err) == (0, "")
    assert "Mean angular error of the best model on the validation subjects" in done.out
    assert contents(run).keys() == before.keys()
    assert (run / EVALUATION).read_bytes() == before[EVALUATION]
    assert json.loads(before[EVALUATION])["num_epochs"] == 2


def test_an_evaluation_that_cannot_be_written_is_a_warning_and_the_summary_is_printed(cli, run):
    (run / EVALUATION).unlink()
    (run / EVALUATION / "in the way").mkdir(parents=True)
    done = cli("evaluate", run, "--write")
    assert done.code == 0
    assert "warning: The evaluation was not written: " in done.err
    assert "Mean angular error of the best model" in done.out


def test_evaluate_writes_those_of_the_members_of_an_ensemble(cli, tmp_path):
    assert cli("train", tmp_path, "e", PHANTOM, *OPTIONS, "--max-epochs", 1, "--num-models", 2).code == 0
    assert cli("evaluate", tmp_path / "e", "--write").code == 0
    assert all((tmp_path / "e" / number / name).is_file() for number in "01" for name in (EVALUATION, FIGURE))


def test_evaluate_takes_the_data_of_the_experiment(cli, run):
    assert cli("evaluate", run).out == cli("evaluate", run, PHANTOM).out != ""
    cli("evaluate", run / "best_model").check_refusal("config.json")


@pytest.mark.parametrize("keep", ["2", "all"])
def test_checkpoints_that_a_kill_kept_from_being_removed_go_with_the_next_resume(cli, finished, tmp_path, keep):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert cli("resume", run, "--new-max-epochs", 4, "--checkpoint-every", "1epoch").code == 0
    whole = contents(run)
    kept = {path.name for path in (run / "checkpoint").iterdir()}
    assert "1" not in kept
    shutil.copytree(finished / "checkpoint" / "1", run / "checkpoint" / "1")  # as before the last step of a save
    (run / EVALUATION).unlink()
    assert cli("resume", run, "--keep", keep).code == 0
    assert {path.name for path in (run / "checkpoint").iterdir()} == (kept if keep == "2" else {*kept, "1"})
    if keep == "2":
        assert contents(run).keys() == whole.keys()
