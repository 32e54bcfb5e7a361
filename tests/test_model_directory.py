"""Claims about model directories: a trained model loads alone, as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dwiml_func import adam, init_state
from dwiml_func.checkpoint.manifest import CheckpointError, manifest_checksum, read_manifest
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.model_store import check_memory, load_model, save_model
from dwiml_func.models.config import ModelConfig, build_model
from dwiml_func.models.learn2track import Learn2Track

CONFIG = ModelConfig(rnn_key="gru", rnn_layer_sizes=(8, 4), nb_previous_dirs=2, dropout=0.25, dg_dropout=0.125)


@pytest.fixture(scope="module")
def batch() -> StreamlineBatch:
    dataset = open_dataset(Path(__file__).parent / "data" / "phantom.hdf5", "validation")
    request = BatchRequest(np.arange(5), None, 0, 0)
    return load_batch(request, dataset=dataset, spec=LoaderSpec())


@pytest.fixture(scope="module")
def model() -> Learn2Track:
    torch.manual_seed(3)
    model = build_model(CONFIG, nb_features=6)
    assert isinstance(model, Learn2Track)
    return model


@pytest.fixture
def saved(model: Learn2Track, tmp_path: Path) -> Path:
    state = init_state(model, adam(), seed=0).replace(epoch=5, step=9)
    config = RunConfig(hdf5_file="data.hdf5", model=CONFIG)
    save_model(tmp_path / "best_model", state, config, nb_features=6, facts={"loss": 0.5})
    return tmp_path / "best_model"


def test_a_model_comes_back_with_bitwise_identical_outputs(saved, model, batch):
    loaded = load_model(saved).module
    assert isinstance(loaded, Learn2Track)
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        expected = model.eval()(batch)
        assert torch.equal(loaded(batch), expected)
        assert torch.equal(loaded(batch), expected)  # no dropout


def test_what_was_recorded_comes_back(saved):
    facts = load_model(saved).facts
    assert facts["class"] == "Learn2Track"
    assert facts["options"] == json.loads(json.dumps(asdict(CONFIG)))
    assert (facts["epoch"], facts["interpolation"], facts["loss"], facts["nb_features"]) == (5, "trilinear", 0.5, 6)


def test_a_directory_holds_the_model_and_nothing_of_the_run(saved, model):
    assert sorted(entry.name for entry in saved.iterdir()) == ["leaves", "model.json"]
    names = [row["name"] for row in read_manifest(saved, "model.json")["leaves"]]
    assert names == list(model.state_dict())


def test_loading_moves_no_global_generator(saved):
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[union-attr]  # noqa: NPY002
    load_model(saved)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[union-attr]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_model_replaces_an_older_one(saved, model, batch):
    other = build_model(ModelConfig(rnn_layer_sizes=(3,)), nb_features=6)
    state = init_state(other, adam(), seed=0).replace(epoch=6)
    config = RunConfig(hdf5_file="data.hdf5", model=ModelConfig(rnn_layer_sizes=(3,)))
    save_model(saved, state, config, nb_features=6, facts={})
    assert load_model(saved).facts["epoch"] == 6
    assert len(list(saved.parent.iterdir())) == 1
    with torch.no_grad():
        assert torch.equal(load_model(saved).module(batch), other.eval()(batch))


def test_the_seed_decides_the_parameters_of_a_new_model():
    torch.manual_seed(5)
    first = build_model(CONFIG, nb_features=6)
    torch.manual_seed(5)
    second = build_model(CONFIG, nb_features=6)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_corrupt_model_is_refused(saved):
    (data,) = (saved / "leaves" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="best_model is corrupt"):
        load_model(saved)
    shutil.rmtree(saved / "leaves")
    with pytest.raises(CheckpointError, match="best_model is corrupt"):
        load_model(saved)


def test_a_model_of_another_class_is_refused(saved):
    manifest = read_manifest(saved, "model.json") | {"class": "Perceptron"}
    (saved / "model.json").write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    with pytest.raises(
        ValueError, match="expected a model of class Learn2Track, Transformer, Autoencoder, received 'Perceptron'"
    ):
        load_model(saved)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model\.json in "):
        load_model(tmp_path)


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_a_model_needs_16_bytes_of_memory_for_each_parameter(monkeypatch, missing, fits):
    """Itself, its gradient and two tensors of the optimizer, in float32."""
    num = sum(parameter.numel() for parameter in build_model(CONFIG, nb_features=6).parameters())
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 16 * num - missing}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    with nullcontext() if fits else pytest.raises(ValueError, match=f"it has {num:.3g} parameters"):
        check_memory(CONFIG, nb_features=6)


@pytest.mark.parametrize(
    ("options", "drops_nothing"),
    [
        ({"dropout": 0.5, "rnn_layer_sizes": (4,)}, True),
        ({"rnn_layer_sizes": (4,)}, False),
        ({"dropout": 0.5, "rnn_layer_sizes": (4, 4)}, False),
        ({"dropout": 0.5, "rnn_layer_sizes": (4,), "nb_previous_dirs": 1}, False),
        ({"dropout": 0.5, "rnn_layer_sizes": (4,), "input_embedding_key": "nn_embedding"}, False),
        ({"dropout": 0.0}, False),
    ],
)
def test_dropout_acts_between_layers_and_on_what_an_embedding_gives(options, drops_nothing):
    assert ModelConfig(**options).drops_nothing == drops_nothing
