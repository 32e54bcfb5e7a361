"""Claims about an experiment's directory: its name, its making, its config."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from experiment_cases import (
    CONFIG,
    contents,
)

from dwiml_func.experiment.folder import check_new_experiment, create_experiment, experiment_directory, read_config


def test_a_new_experiment_holds_its_config_and_nothing_else(tmp_path):
    directory = create_experiment(tmp_path, "first", CONFIG)
    assert directory == tmp_path / "first"
    assert os.listdir(tmp_path) == ["first"]
    assert os.listdir(directory) == ["config.json"]
    assert read_config(directory) == CONFIG


def test_an_experiment_that_exists_is_refused(tmp_path):
    create_experiment(tmp_path, "first", CONFIG)
    (tmp_path / "file").touch()
    for name in ("first", "file"):
        with pytest.raises(ValueError, match=f"Experiment '{name}' exists in .*resume"):
            check_new_experiment(tmp_path, name)
        with pytest.raises(ValueError, match=f"Experiment '{name}' exists in .*resume"):
            create_experiment(tmp_path, name, CONFIG)


def test_of_two_processes_that_create_one_experiment_one_is_refused(tmp_path, monkeypatch):
    def check_and_be_overtaken(path: Path, name: str) -> Path:
        directory = check_new_experiment(path, name)
        directory.mkdir()
        (directory / "config.json").write_text("the other's")
        return directory

    monkeypatch.setattr("dwiml_func.experiment.folder.check_new_experiment", check_and_be_overtaken)
    with pytest.raises(OSError, match="not empty"):
        create_experiment(tmp_path, "first", CONFIG)
    assert contents(tmp_path) == {"first/config.json": b"the other's"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "/a", "a\\b", "a\0b", "a\nb", "a\rb", "a\x1bb", "../a"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"Experiment name .* cannot be a folder's name") as raised:
        experiment_directory(tmp_path, name)
    assert repr(name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a", "a b", "é", "a.b", "a-b", "1", "_", "日本"])
def test_a_plain_name_is_taken(tmp_path, name):
    assert experiment_directory(tmp_path, name) == tmp_path / name


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file", "a\0b"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            experiment_directory(path, "a")
