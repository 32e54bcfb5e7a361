"""Claims about padded batches: equal to packed ones to rounding, of few lengths, and without a wait for the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import CONFIG
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.compiled.step import jit_step
from dwiml_func.core.loss import module_loss
from dwiml_func.core.rng import Key
from dwiml_func.core.state import init_state
from dwiml_func.core.step import train_step
from dwiml_func.data.augmentation import Augmentation
from dwiml_func.data.batch import StreamlineBatch
from dwiml_func.data.dataset import StreamlineDataset
from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.data.padding import NUM_LENGTHS, padded_lengths, with_fixed_shape, with_padded_length
from dwiml_func.data.resampling import Resampling
from dwiml_func.data.shards import cut_batch
from dwiml_func.experiment.batches import make_batches, open_data, with_padded_lengths
from dwiml_func.experiment.folder import create_experiment, read_config
from dwiml_func.experiment.run import run_experiment
from dwiml_func.experiment.setup import prepare
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss
from dwiml_func.models.rnn import stacked
from dwiml_func.models.rnn.cudnn import cudnn_scan
from dwiml_func.models.rnn.packing import packed_layout, padded_layout
from dwiml_func.models.rnn.stacked import RecurrentLayer
from dwiml_func.models.transformers.transformer import Transformer
from dwiml_func.optim import adam

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
LENGTHS = (5, 1, 3, 8, 0, 3)
SMALL: dict[str, Any] = {"input_embedded_size": 8, "nheads": 2, "n_layers_e": 2, "dropout_rate": 0.0}
MODELS: dict[str, Callable[[int], Any]] = {
    "lstm": lambda num: Learn2Track(num, rnn_layer_sizes=(7, 5), nb_previous_dirs=2, use_skip_connection=True),
    "gru": lambda num: Learn2Track(num, rnn_key="gru", rnn_layer_sizes=(7, 5), use_layer_normalization=True),
    "tts": lambda num: Transformer(num, model="tts", **SMALL),
    "ttst": lambda num: Transformer(num, model="ttst", target_embedded_size=4, **SMALL),
    "tto": lambda num: Transformer(num, model="tto", **SMALL),
}


def _offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _batch(*, add_eos: bool = False, num: int = 12) -> StreamlineBatch:
    """Of both subjects, with noise of its own on what a model sees and on the targets."""
    noise = Augmentation(noise_gaussian_size_forward=0.1, noise_gaussian_size_loss=0.05)
    request = BatchRequest(np.arange(num) * 37 % 96, Key(5), 0, 0)
    return load_batch(request, dataset=_dataset(), spec=LoaderSpec(add_eos=add_eos, augmentation=noise))


@cache
def _dataset() -> StreamlineDataset:
    return open_dataset(PHANTOM)


def _results(model: Any, batch: StreamlineBatch) -> list[Tensor]:
    model.zero_grad()
    loss, weight, aux = compute_batch_loss(model, batch)
    loss.backward()
    outputs = model(batch) if batch.is_real is None else model(batch)[batch.is_real]
    numbers = [torch.as_tensor(number) for number in tree_leaves((weight, aux))]
    return [outputs, loss, *numbers, *(parameter.grad for parameter in model.parameters())]


def test_rows_lie_time_step_by_time_step_and_padding_is_zero() -> None:
    rows = torch.randn(sum(LENGTHS), 2, requires_grad=True)
    layout = padded_layout(_offsets(), len(rows), 10)
    padded = layout.pack(rows).unflatten(0, (10, len(LENGTHS)))
    for number, (start, length) in enumerate(zip(_offsets().tolist(), LENGTHS, strict=False)):
        assert torch.equal(padded[:length, number], rows[start : start + length])
        assert not padded[length:, number].any()
    assert torch.equal(layout.unpack(layout.pack(rows)), rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_torchs_padded_layers_give_the_outputs_and_gradients_of_our_packed_ones(
    rnn_key: str, dtype: torch.dtype, tolerance: float
) -> None:
    """What cuDNN computes on a GPU, on the CPU."""
    torch.manual_seed(3)
    layer, flat = RecurrentLayer(rnn_key, 4, 6).to(dtype), torch.randn(sum(LENGTHS), 4, dtype=dtype)
    factors, results = torch.randn(len(flat), 6, dtype=dtype), []
    packed, padded = packed_layout(_offsets()), padded_layout(_offsets(), len(flat), 10)
    state = (torch.zeros(len(LENGTHS), 6, dtype=dtype),) * (2 if rnn_key == "lstm" else 1)
    for layout, run in (
        (packed, layer),
        (padded, layer),
        (padded, lambda x, sizes: cudnn_scan(rnn_key, x, sizes, layer.weights, state)[0]),
    ):
        x = flat.clone().requires_grad_()
        rows = layout.pack(x)
        rows.retain_grad()
        outputs = layout.unpack(run(rows, layout.batch_sizes))
        gradients = torch.autograd.grad((outputs * factors).sum(), [rows, x, *layer.parameters()])
        if layout is padded:
            is_padding = torch.ones(len(rows), dtype=torch.bool).index_fill(0, padded.slots, False)
            assert not gradients[0][is_padding].any()  # and no mask
        results.append((outputs, *gradients[1:]))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_gives_the_loss_and_gradients_of_a_packed_one(name: str, add_eos: bool) -> None:
    batch = _batch(add_eos=add_eos, num=17)
    model: Any = MODELS[name](batch.inputs.shape[1])
    if add_eos:
        model.direction_getter = Learn2Track(
            3, rnn_layer_sizes=(model.direction_getter.input_size,), dg_args={"add_eos": True}
        ).direction_getter
    padded = with_padded_length(batch, (5,))
    assert padded.padded_length is not None
    assert 0 <= padded.padded_length - int(batch.input_offsets.diff().max()) < 5
    filled = with_fixed_shape(padded)
    assert filled.num_points == padded.padded_length * len(filled)
    assert (len(batch), len(filled)) == (17, 18)
    for name in ("ids", "subject"):
        assert torch.equal(getattr(filled, name)[:17], getattr(batch, name))
    for other in (padded, filled):
        for ours, theirs in zip(_results(model, other), _results(model, batch), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "tto"])
def test_a_step_on_a_padded_batch_waits_for_no_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, which has shapes and no values, whatever reads one fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no meta
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    monkeypatch.setattr(stacked, "_scan_for", lambda device: cudnn_scan)  # as on a GPU
    offsets, numbers = _offsets(tuple(length + 1 for length in LENGTHS)), torch.arange(len(LENGTHS))
    points, inputs = torch.zeros(int(offsets[-1]), 3), torch.zeros(sum(LENGTHS), 6)
    batch = StreamlineBatch(points=points, offsets=offsets, subject=numbers, ids=numbers, inputs=inputs)
    batch = with_padded_length(batch, (5,))
    filled, batch = with_fixed_shape(batch).to("meta"), batch.to("meta")
    model = MODELS[name](batch.inputs.shape[1]).to("meta")
    fixed = {"loss_fn": module_loss(model, compute_batch_loss), "optimizer": adam(), "clip_grad": 1.0}
    captured = jit_step(**fixed, donate=True, cuda_graphs=True)
    assert captured._replays is not None
    captured._replays._capture = lambda step: step
    state = init_state(model, adam(), seed=0)
    for _ in range(4):
        state, _ = captured(state, filled, lr=1e-3)
    assert (captured.num_cuda_graphs, captured.cuda_graphs_reason) == (1, None)
    step = partial(train_step, **fixed, lr=1e-3)
    state, metrics = step(state, batch)
    total: Any = metrics["loss"].total
    assert total.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        step(state, replace(batch, padded_length=None))


def test_there_are_few_lengths_and_a_batch_alone_decides_its_own() -> None:
    dataset = _dataset()
    known, longest = padded_lengths([dataset], Resampling()), int(dataset.streamlines.lengths.max())
    step = known[0]
    assert known == tuple(step * number for number in range(1, NUM_LENGTHS + 1))
    assert longest <= known[-1] < longest + NUM_LENGTHS
    for num in range(1, 40, 3):
        batch, own = _batch(num=num), int(_batch(num=num).input_offsets.diff().max())
        length = with_padded_length(batch, known).padded_length
        assert length in known
        assert own <= length < own + step
    own = int(_batch().input_offsets.diff().max())
    assert with_padded_length(_batch(), (2, own - 1, own, own + 1)).padded_length == own
    assert with_padded_length(_batch(), (own - 1,)).padded_length == 2 * (own - 1)
    assert padded_lengths([dataset], Resampling(nb_points=81)) == tuple(range(11, 89, 11))
    mm = dataset.index.lengths_mm
    assert mm is not None
    empty = open_dataset(PHANTOM, "testing")
    assert padded_lengths([empty, dataset], Resampling()) == known
    assert padded_lengths([empty], Resampling())[0] == 1
    longer = replace(dataset, index=replace(dataset.index, lengths_mm=2 * mm))
    assert padded_lengths([longer], dataset.resampling) == known  # the file has that step: its points count
    both = padded_lengths([dataset, longer], Resampling(step_size=1.0))
    assert both == padded_lengths([longer], Resampling(step_size=1.0))
    assert padded_lengths([dataset], Resampling(step_size=0.1))[0] == -(-(round(mm.max() / 0.1) + 1) // NUM_LENGTHS)


@pytest.mark.parametrize("lengths", [(1, 4, 2), (3, 1, 1)])
def test_streamlines_of_one_point_have_no_real_row(lengths: tuple[int, ...]) -> None:
    offsets, numbers = _offsets(lengths), torch.arange(len(lengths))
    points = torch.arange(3.0 * sum(lengths)).reshape(-1, 3)
    inputs = points[torch.ones(len(points), dtype=torch.bool).index_fill(0, offsets[1:] - 1, False)]
    batch = StreamlineBatch(points=points, offsets=offsets, subject=numbers, ids=numbers, inputs=inputs)
    filled = with_fixed_shape(with_padded_length(batch, (3,)))
    assert filled.is_real is not None
    assert torch.equal(filled.inputs[filled.is_real], inputs)
    assert filled.is_real.unflatten(0, (len(lengths), 3)).sum(1).tolist() == [length - 1 for length in lengths]


def test_a_model_with_a_largest_length_pads_to_no_more_and_shards_have_their_own() -> None:
    batch = _batch()
    longest = int(batch.input_offsets.diff().max())
    assert with_padded_length(batch, (1000,)).padded_length == 1000
    assert with_padded_length(batch, (1000,), max_len=longest + 2).padded_length == longest + 2
    assert with_padded_length(batch, (1000,), max_len=longest - 1).padded_length == longest  # the model refuses it
    shards = with_padded_length(cut_batch(batch, 3), range(1, 100))
    own = [int(shard.input_offsets.diff().max()) for shard in shards if shard is not None]
    assert [shard.padded_length for shard in shards if shard is not None] == own


def test_a_run_pads_when_it_is_told_to_and_on_the_cpu_not_by_itself() -> None:
    data, lengths = open_data(CONFIG), {}
    for choice in ("auto", "on", "off"):
        config = replace(CONFIG, training=replace(CONFIG.training, pad_batches=choice))
        train, valid, _ = make_batches(config, data, torch.device("cpu"))
        assert valid is not None
        key: Any = init_state(torch.nn.Linear(1, 1), adam(), seed=0).key
        lengths[choice] = [batch.padded_length for batch in (*train(key, 0, 0), *valid(key, 0, 0))]
    assert set(lengths["auto"]) == set(lengths["off"]) == {None}
    assert None not in lengths["on"]


@pytest.mark.parametrize(
    ("pads", "recorded", "expected"),
    [("off", None, None), ("off", (3, 77), (3, 77)), ("on", None, (5, 9)), ("on", (3, 77), (3, 77))],
)
def test_a_config_has_the_lengths_of_the_data_unless_it_has_some(monkeypatch, pads, recorded, expected) -> None:
    def lengths_of(datasets: Any, resampling: Any) -> tuple[int, ...]:
        assert (datasets, resampling) == (("a", "b"), config.batches.resampling)
        return (5, 9)

    config = replace(CONFIG, training=replace(CONFIG.training, pad_batches=pads), padded_lengths=recorded)
    monkeypatch.setattr("dwiml_func.experiment.batches.padded_lengths", lengths_of)
    data: Any = SimpleNamespace(training="a", validation="b")
    assert with_padded_lengths(config, data) == replace(config, padded_lengths=expected)


def test_a_run_records_its_lengths_and_a_resume_takes_and_compares_them(cli: Any, tmp_path: Path) -> None:
    train = ("train", tmp_path, "run", PHANTOM, "--pad-batches", "on", "--rnn-layer-sizes", "4", "--max-epochs", "1")
    assert cli(*train, "--skip-window-lag", "--skip-figures").code == 0
    path, lengths = tmp_path / "run" / "config.json", padded_lengths([_dataset()], Resampling())
    config = read_config(tmp_path / "run")
    assert config.padded_lengths is not None
    assert config.padded_lengths[-1] >= lengths[-1]  # the validation subjects count too
    train_batches, *_ = make_batches(replace(config, padded_lengths=(3, 77)), open_data(config), torch.device("cpu"))
    key: Any = init_state(torch.nn.Linear(1, 1), adam(), seed=0).key
    assert {batch.padded_length for batch in train_batches(key, 0, 0)} <= {3, 77}  # not computed again
    assert cli(*train, "--skip-window-lag").code == 0  # the same command finds the same run
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"padded_lengths": [3, 77]}))
    refused = cli("resume", tmp_path, "run", "--new-max-epochs", "2")
    assert refused.code == 2
    assert f"padded_lengths [3, 77], recorded {list(config.padded_lengths)}" in refused.err
    path.write_text(text)
    assert cli("resume", tmp_path, "run", "--new-max-epochs", "2").code == 0

    old = replace(config, padded_lengths=None)  # as an earlier version recorded it
    directory = create_experiment(tmp_path, "old", old)
    list(run_experiment(directory, prepare(old)))
    (directory / "config.json").write_text(
        json.dumps({k: v for k, v in json.loads(text).items() if k != "padded_lengths"})
    )
    assert cli("resume", tmp_path, "old", "--new-max-epochs", "2").code == 0
    assert len({read(tmp_path / name, "2").digest for name in ("run", "old")}) == 1
