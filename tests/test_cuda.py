"""Claims about runs on a GPU, `pytest -m cuda tests/test_cuda.py`. They are skipped where there is none.

With DWIML_TEST_DEVICE=cpu the same tests run on the CPU through what the GPU takes: data on the device, padded batches,
torch's own recurrent layers, deferred checks. What only a GPU can show (waits, memory, rounding) is left out there.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import CONFIG, latest_digest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dwiml_func import optim
from dwiml_func._transforms import is_transformed
from dwiml_func.checkpoint.checkpoint import read
from dwiml_func.checkpoint.index import list_checkpoints
from dwiml_func.compiled import cuda_graphs
from dwiml_func.core.loss import module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.non_finite import NonFiniteError
from dwiml_func.core.rng import Key
from dwiml_func.core.run_epoch import run_epoch
from dwiml_func.core.state import init_state
from dwiml_func.core.step import train_step
from dwiml_func.experiment.config import RunConfig
from dwiml_func.experiment.setup import RunParts, prepare
from dwiml_func.experiment.training_config import TrainingConfig
from dwiml_func.models import Learn2Track
from dwiml_func.models.config import ModelConfig
from dwiml_func.models.rnn import stacked
from dwiml_func.models.rnn.autograd import kernel_scan
from dwiml_func.models.rnn.cudnn import cudnn_scan
from dwiml_func.optim import adam
from dwiml_func.tracking import TrackingSpace, TrackingSpec, track
from dwiml_func.types import Optimizer

DEVICE = torch.device(os.environ.get("DWIML_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU has this")

AS_ON_GPU: dict[str, Any] = {"device_data": "on", "pad_batches": "on", "skip_window_lag": True}
OPTIONS = (
    *("--rnn-layer-sizes", "8", "8", "--dropout", "0.25", "--nb-previous-dirs", "1", "--skip-window-lag"),
    *("--batch-size-training", "30", "--batch-size-validation", "20", "--max-epochs", "3", "--reverse-ratio", "0.5"),
    *("--noise-gaussian-size-forward", "0.1", "--device-data", "on", "--pad-batches", "on"),
    *(("--use-gpu",) if ON_GPU else ()),
)
SMALL: dict[str, Any] = {"input_embedded_size": 8, "nheads": 2, "n_layers_e": 1, "dropout_rate": 0.0}
MODELS = {
    "lstm": ModelConfig(rnn_layer_sizes=(8, 6), nb_previous_dirs=1),
    "gru": ModelConfig(rnn_key="gru", rnn_layer_sizes=(8, 6), dg_key="sphere-classification", add_eos=True),
    "gaussian": ModelConfig(rnn_layer_sizes=(8,), use_layer_normalization=True, dg_key="gaussian"),
    "fisher": ModelConfig(rnn_layer_sizes=(8, 6), use_skip_connection=True, dg_key="fisher-von-mises"),
    "tts": ModelConfig(model="tts", **SMALL),
    "ttst": ModelConfig(model="ttst", target_embedded_size=4, **SMALL),
    "tto": ModelConfig(model="tto", **SMALL),
    "autoencoder": ModelConfig(model="autoencoder", latent_space_dims=4, first_channels=2),
}


@pytest.fixture(autouse=True)
def _paths_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_GPU:
        monkeypatch.setattr(stacked, "_scan_for", lambda device: kernel_scan if is_transformed() else cudnn_scan)
    yield
    torch.set_float32_matmul_precision("highest")


def config_of(model: ModelConfig = MODELS["lstm"], *, on_device: bool = True, **training: Any) -> RunConfig:
    options = {**CONFIG.training.__dict__, "skip_window_lag": True}
    options |= {**AS_ON_GPU, "use_gpu": ON_GPU} if on_device else {"use_gpu": False}
    return RunConfig(
        hdf5_file=str(PHANTOM),
        model=model,
        batches=CONFIG.batches,
        training=replace(CONFIG.training, **options | training),
    )


def first_losses(parts: RunParts, num: int = 3) -> list[float]:
    """Of training steps and one validation batch."""
    assert parts.valid is not None
    state, losses = parts.first_state(), []
    for batch in islice(parts.train(state.key, 0, 0), num):
        state, metrics = parts.step(state, batch, lr=1e-3)
        losses.append(read_means(metrics)["loss"])
    losses += [read_means(parts.eval_step(state, each))["loss"] for each in islice(parts.valid(state.key, 0, 0), 1)]
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_with_the_losses_of_the_cpu_and_the_same_bits_again(name: str) -> None:
    ours = first_losses(prepare(config_of(MODELS[name])))
    assert first_losses(prepare(config_of(MODELS[name]))) == ours
    np.testing.assert_allclose(ours, first_losses(prepare(config_of(MODELS[name], on_device=False))), rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"num_shards": 2}, {"precision": "bf16"}, {"clip_grad": 0.1}, {"device_data": "off"}]
)
def test_shards_bf16_clipping_and_batches_that_are_copied_train_alike(changes: dict[str, Any]) -> None:
    ours, expected = first_losses(prepare(config_of(**changes))), first_losses(prepare(config_of(on_device=False)))
    assert first_losses(prepare(config_of(**changes))) == ours
    np.testing.assert_allclose(ours, expected, rtol=2e-2 if "precision" in changes or "clip_grad" in changes else 1e-5)


def train(cli: Any, folder: Path, name: str, *options: str) -> Path:
    outcome = cli("train", folder, name, PHANTOM, *OPTIONS, *options)
    assert outcome.code == 0, outcome.err
    return folder / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs in a process of their own."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        command("train", folder, "run", PHANTOM, *OPTIONS), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dwiml_func", *map(str, arguments)]


@pytest.mark.usefixtures("_paths_of_every_process")
def test_runs_and_processes_end_in_one_digest_and_an_epoch_is_verified(cli: Any, tmp_path: Path, whole: Path) -> None:
    ours = train(cli, tmp_path, "run")
    assert latest_digest(ours) == latest_digest(whole)
    outcome = cli("verify", ours, "--epoch", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "is bitwise identical to the recorded epoch" in outcome.out


@pytest.fixture
def _paths_of_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes have no replaced paths: undo them where two processes are compared."""
    if not ON_GPU:
        monkeypatch.undo()


@pytest.mark.usefixtures("_paths_of_every_process")
def test_a_run_that_was_killed_resumes_to_the_same_end(cli: Any, tmp_path: Path, whole: Path) -> None:
    arguments = ("train", tmp_path, "run", PHANTOM, *OPTIONS, "--checkpoint-every", "1batches")
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints, until = tmp_path / "run" / "checkpoint", time.monotonic() + 120
    while process.poll() is None and not list(checkpoints.glob("*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list_checkpoints(tmp_path / "run"))
    outcome = cli("resume", tmp_path, "run")
    assert outcome.code == 0, (done, outcome.err)
    assert latest_digest(tmp_path / "run") == latest_digest(whole)


def test_a_run_continues_on_the_other_device_and_back_close_but_not_equal(cli: Any, tmp_path: Path) -> None:
    """Without dropout, whose random numbers differ between devices. On the CPU alone, packed batches are the other."""
    option, there, elsewhere = ("use_gpu", True, False) if ON_GPU else ("pad_batches", "on", "off")
    for name, epochs in (("run", "1"), ("whole", "3")):
        train(cli, tmp_path, name, "--dropout", "0", "--max-epochs", epochs)
    config_file = tmp_path / "run" / "config.json"
    for epochs, value in (("2", elsewhere), ("3", there)):
        config = json.loads(config_file.read_text())
        config["training"][option] = value
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        moved = ("resume", tmp_path, "run", "--new-max-epochs", epochs)
        cli(*moved).check_refusal(f"training.{option}")  # it is said, not silently done
        outcome = cli(*moved, "--accept", f"training.{option}")
        assert outcome.code == 0, outcome.err
    ours, theirs = (read(tmp_path / name).state for name in ("run", "whole"))
    assert (ours.epoch, ours.step) == (theirs.epoch, theirs.step)
    for name, tensor in ours.params.items():
        torch.testing.assert_close(tensor, theirs.params[name], rtol=1e-3, atol=1e-4)
    if ON_GPU:
        assert latest_digest(tmp_path / "run") != latest_digest(tmp_path / "whole")


def mlp(non_finite: Any = "defer", donate: bool = False) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).to(DEVICE)
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)))
    step = partial(train_step, loss_fn=loss_fn, optimizer=adam(), non_finite=non_finite, donate=donate)
    return step, init_state(model, adam(), seed=1)


def test_a_nan_under_the_deferred_check_ends_the_epoch_and_training_resumes_without_it() -> None:
    """The state stays as it was before the bad batch, from which the training continues without it."""
    good = [torch.randn(6, 4, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(4)]
    bad = good[1].clone()
    bad[2, 3] = float("nan")
    step, state = mlp()
    first, _ = step(state, good[0], lr=0.1)
    after_bad, _ = step(first, bad, lr=0.1)
    for name, tensor in first.params.items():
        assert torch.equal(after_bad.params[name], tensor)
    after_good, _ = step(after_bad, good[2], lr=0.1)  # within the epoch no later step counts
    assert all(torch.equal(after_good.params[name], tensor) for name, tensor in first.params.items())
    with pytest.raises(NonFiniteError, match=r"not finite in epoch 1, batch 2"):
        run_epoch(state, train=lambda key, epoch, start: [good[0], bad, good[2]], step=step, learning_rate=0.1)
    resumed, _ = step(first, good[2], lr=0.1)
    assert all(torch.isfinite(tensor).all() for tensor in resumed.params.values())
    assert any(not torch.equal(resumed.params[name], tensor) for name, tensor in first.params.items())


def test_a_donating_step_gives_the_same_numbers_and_its_state_cannot_be_used_again() -> None:
    batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in range(3)]
    ends = []
    for donate in (False, True):
        step, state = mlp(donate=donate)
        before = state
        for batch in batches:
            before, (state, _) = state, step(state, batch, lr=0.1)
        ends.append(state)
        if donate:
            with pytest.raises(RuntimeError, match="donated"):
                step(before, batches[0], lr=0.1)
    assert all(torch.equal(ends[0].params[name], tensor) for name, tensor in ends[1].params.items())


@pytest.mark.parametrize("rnn_key", ["lstm", "gru"])
def test_padded_cudnn_equals_the_cpus_packed_layers_at_every_length(rnn_key: str) -> None:
    from dwiml_func.models.rnn.packing import packed_layout, padded_layout

    with torch.random.fork_rng():
        torch.manual_seed(2)
        rnn = stacked.StackedRNN(rnn_key, 5, (9, 7))
    results: dict[int, list[Tensor]] = {}
    lengths = torch.tensor([4, 1, 7, 7, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    flat = torch.randn(int(offsets[-1]), 5, generator=torch.Generator().manual_seed(1))
    for length in (0, 7, 8, 16):  # 0: packed, on the CPU
        device = DEVICE if length else torch.device("cpu")
        own = rnn.to(device)
        layout: Any = padded_layout(offsets.to(device), len(flat), length) if length else packed_layout(offsets)
        outputs = layout.unpack(own(layout.pack(flat.to(device)), layout.batch_sizes))
        gradients = torch.autograd.grad(outputs.square().sum(), list(own.parameters()))
        results[length] = [tensor.detach().cpu() for tensor in (outputs, *gradients)]
    for length in (7, 8, 16):
        for ours, theirs in zip(results[length], results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_members_of_an_ensemble_train_as_they_do_alone(cli: Any, tmp_path: Path) -> None:
    folder = train(cli, tmp_path, "two", "--num-models", "2", "--max-epochs", "1", "--dropout", "0")
    seeds = [json.loads((folder / str(n) / "config.json").read_text())["training"]["rng"] for n in range(2)]
    alone = train(cli, tmp_path, "alone", "--rng", str(seeds[0]), "--max-epochs", "1", "--dropout", "0")
    ours, theirs = read(folder / "0").state, read(alone).state
    for name, tensor in ours.params.items():
        torch.testing.assert_close(tensor, theirs.params[name], rtol=1e-3, atol=1e-4)


@only_on_gpu
def test_a_captured_ensemble_is_resumed_to_the_same_bits_and_reports_its_graphs(cli: Any, tmp_path: Path) -> None:
    options = ("--num-models", "2", "--compile", "--dropout", "0.2")
    whole = train(cli, tmp_path, "whole", *options, "--max-epochs", "2")
    stopped = train(cli, tmp_path, "stopped", *options, "--max-epochs", "1")
    done = cli("resume", tmp_path, "stopped", "--new-max-epochs", "2")
    assert "Steps were replays of" in done.out
    for number in "01":
        assert latest_digest(stopped / number) == latest_digest(whole / number)


def test_lines_tracked_on_the_device_are_those_of_the_cpu_to_rounding() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Learn2Track(6, rnn_layer_sizes=(8,), nb_previous_dirs=1).eval()
    seeds = 3 + 4 * torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    volume = torch.randn(10, 10, 10, 6, generator=torch.Generator().manual_seed(2))
    spec, lines = TrackingSpec(step_size=1, min_length=0, max_length=8, theta=180), []
    for device in (torch.device("cpu"), DEVICE):
        space = TrackingSpace(volume=volume.to(device), voxel_sizes=(2.0, 2.0, 2.0))
        found = track(seeds, model=model.to(device), space=space, spec=spec, key=Key(1), num_rows=64)
        lines.append([line.cpu() for tracked in found for line in tracked.streamlines.to_list()])
    assert len(lines[0]) == len(lines[1])
    near = [
        ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-2 for ours, theirs in zip(*lines, strict=True)
    ]
    assert np.mean(near) > 0.9  # a turn at the limit, or at the border, may fall the other way


@only_on_gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "tts", "tto"])
def test_a_step_and_the_batch_before_it_wait_for_the_device_not_once(name: str, is_compiled: bool) -> None:
    parts = prepare(config_of(MODELS[name], compile=is_compiled))
    state = parts.first_state()
    for _ in range(3):  # the first ones check the loss, make cuDNN's plans, and capture
        for batch in islice(parts.train(state.key, 0, 0), 3):
            state, _ = parts.step(state, batch, lr=1e-3)
    batches = iter(parts.train(state.key, 0, 0))
    first = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in (first, *islice(batches, 2)):
            state, _ = parts.step(state, batch, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_on_gpu
@pytest.mark.parametrize(
    "optimizer",
    [adam(), optim.chain(optim.accumulate(2), optim.clip_by_global_norm(0.1), adam()), optim.schedule_free_adamw()],
)
def test_a_deferred_donating_step_needs_the_memory_of_a_plain_loop_and_of_one_copy_of_the_gradients(
    optimizer: Optimizer,
) -> None:
    with torch.device(DEVICE):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
    batch, peaks = torch.randn(8, 1024, device=DEVICE), []
    loss_fn = module_loss(model, lambda model, x: (model(x).square().mean(), len(x)), stochastic=False)
    state = init_state(model, optimizer, seed=0)
    bare, plain_optimizer = model, torch.optim.Adam(model.parameters(), lr=1e-3)

    def plain() -> None:
        plain_optimizer.zero_grad()
        bare(batch).square().mean().backward()
        plain_optimizer.step()

    def ours() -> None:
        nonlocal state
        state, _ = train_step(state, batch, loss_fn=loss_fn, optimizer=optimizer, lr=1e-3, donate=True)

    for step in (plain, ours):
        step()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert peaks[1] <= peaks[0] + 1.1 * num_bytes


@pytest.mark.parametrize("name", ["lstm", "gru", "tts", "tto", "autoencoder"])
def test_a_compiled_run_replays_graphs_with_the_bits_of_its_steps_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a schedule and dropout, on batches of which none is like the other. On the CPU a replay runs the step."""
    if not ON_GPU:
        monkeypatch.setattr(TrainingConfig, "captures", property(lambda config: config.compile))
    model = MODELS[name]
    drops = {} if name == "autoencoder" else {"dropout_rate" if name.startswith("t") else "dropout": 0.25}
    states = []
    for is_captured in (True, False):
        parts = prepare(config_of(replace(model, **drops), compile=True))
        step: Any = parts.step
        if not ON_GPU:
            step._replays._capture = lambda step: step
        step._replays._is_stopped = not is_captured
        state = parts.first_state()
        for number, batch in enumerate(chain(*(islice(parts.train(state.key, epoch, 0), 3) for epoch in range(3)))):
            state, _ = step(state, batch, lr=1e-3 / (1 + number))
        states.append(state)
        assert step.cuda_graphs_reason is None
        assert (step.num_cuda_graphs > 0) == is_captured
    for kind in ("params", "opt_state"):
        for ours, theirs in zip(*(tree_leaves(getattr(state, kind)) for state in states), strict=True):
            assert torch.equal(ours, theirs)


def test_a_captured_step_has_the_losses_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(TrainingConfig, "captures", property(lambda config: config.compile))
        monkeypatch.setattr(cuda_graphs.OnCuda, "__call__", lambda self, step: step)
    for name in ("lstm", "gru"):
        ours = first_losses(prepare(config_of(MODELS[name], compile=True)), num=5)
        expected = first_losses(prepare(config_of(MODELS[name], on_device=False)), num=5)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_compiled_run_that_is_resumed_ends_in_the_digest_of_one_that_is_not(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ON_GPU:
        monkeypatch.setattr(TrainingConfig, "captures", property(lambda config: config.compile))
        monkeypatch.setattr(cuda_graphs.OnCuda, "__call__", lambda self, step: step)
    train(cli, tmp_path, "whole", "--compile")
    train(cli, tmp_path, "run", "--compile", "--max-epochs", "1")
    outcome = cli("resume", tmp_path, "run", "--new-max-epochs", "3")
    assert outcome.code == 0, outcome.err
    assert re.search(r"Steps were replays of \d+ CUDA graph", outcome.out + outcome.err)
    assert latest_digest(tmp_path / "run") == latest_digest(tmp_path / "whole")
