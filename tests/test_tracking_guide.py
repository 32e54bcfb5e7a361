"""The guide of tracking is true: its commands and its script run as they stand there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from experiment_cases import trained

from dwiml_func.data.config import BatchConfig
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models.config import ModelConfig

GUIDE = (Path(__file__).parents[1] / "docs" / "tracking.md").read_text()


@pytest.fixture
def folder(example_hdf5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example data and a model that was trained on it for a moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    shutil.copy(example_hdf5, "experiments/example_data.hdf5")
    batches = BatchConfig(max_batches_per_epoch_training=20, max_batches_per_epoch_validation=1)
    training = TrainingConfig(max_epochs=1, learning_rate=("0.01",), skip_window_lag=True)
    data, model = "experiments/example_data.hdf5", ModelConfig(rnn_layer_sizes=(8,))
    trained(
        Path("experiments"), RunConfig(hdf5_file=data, model=model, batches=batches, training=training), "first_run"
    )
    return tmp_path


def test_the_commands_and_the_script_of_the_guide_run(cli, folder, capfd):
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "dwiml-func"
        result = cli(*arguments)
        assert result.code == 0, result.err
        assert "streamlines" in result.out
    assert (folder / "sub_5.trk").stat().st_size > 1000

    (script,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    exec(compile(script, "docs/tracking.md", "exec"), {})
    last = capfd.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"200 seeds done, \d+ lines, torch.Size\(\[\d+, 3\]\)", last)


def test_every_option_of_the_guide_exists():
    from dwiml_func.cli.track import Options

    rows = re.findall(r"^\| (`--.*?) \|", GUIDE, flags=re.MULTILINE)
    options = {name.replace("-", "_") for row in rows for name in re.findall(r"--([a-z-]+)", row)}
    assert options <= set(Options.__dataclass_fields__)
    assert len(options) > 20
