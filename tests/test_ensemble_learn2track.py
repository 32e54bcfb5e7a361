"""Claims about ensembles of Learn2Track: the recurrent core, all direction getters and dropout under vmap."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dwiml_func.checkpoint.digest import state_leaves
from dwiml_func.core.loss import LossFn, module_loss
from dwiml_func.core.metrics import read_means
from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.core.state import TrainState, init_state
from dwiml_func.core.step import eval_step, train_step
from dwiml_func.data import LoaderSpec, SamplerSpec, StreamlineBatch, epoch_batches, open_dataset
from dwiml_func.ensemble.state import member, member_sums, stack_states
from dwiml_func.ensemble.step import ensemble_eval_step, ensemble_step
from dwiml_func.models.direction_getters import DIRECTION_GETTERS
from dwiml_func.models.learn2track import Learn2Track, compute_batch_loss
from dwiml_func.optim.optimizers import adam

DATA = Path(__file__).parent / "data" / "phantom.hdf5"
SEEDS = (1, 2, 3)


def load(count: int, dtype: torch.dtype, *, add_eos: bool = False) -> list[StreamlineBatch]:
    dataset, sampler = open_dataset(DATA, "training"), SamplerSpec(batch_size=6, max_batches=count)
    loader = LoaderSpec(add_eos=add_eos)
    batches = epoch_batches(dataset, sampler, loader, key=Key(1), epoch=0, start_batch=0)
    return [replace(b, points=b.points.to(dtype), inputs=b.inputs.to(dtype)) for b in batches]


def start(dtype: torch.dtype, **options: Any) -> tuple[LossFn, list[TrainState]]:
    def make(seed: int) -> Learn2Track:
        with torch_rng(Key(seed)):
            return Learn2Track(6, nb_previous_dirs=1, rnn_layer_sizes=(5, 4), **options).to(dtype)

    return module_loss(make(0), compute_batch_loss), [init_state(make(seed), adam(), seed=seed) for seed in SEEDS]


def train(
    dtype: torch.dtype, num_batches: int, **options: Any
) -> tuple[list[TrainState], list[TrainState], list[dict[str, float]], list[dict[str, float]]]:
    """Members after some steps, separate runs after them, and the last validation of each."""
    batches = load(num_batches, dtype, add_eos=options.get("dg_args", {}).get("add_eos", False))
    loss_fn, states = start(dtype, **options)
    bound: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": adam(weight_decay=0.01), "lr": 0.01, "clip_grad": 1.0}
    ensemble = stack_states(states)
    for batch in batches:
        ensemble, _ = ensemble_step(ensemble, batch, **bound)
        states = [train_step(state, batch, **bound)[0] for state in states]
    sums = ensemble_eval_step(ensemble, batches[0], loss_fn=loss_fn)
    losses = [read_means(own) for own in member_sums(sums, len(SEEDS))]
    own_losses = [read_means(eval_step(state, batches[0], loss_fn=loss_fn)) for state in states]
    return [member(ensemble, n) for n in range(len(SEEDS))], states, losses, own_losses


def flat(state: TrainState) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in state_leaves(state).values()])


MODELS = {
    **{key: {"dg_key": key} for key in DIRECTION_GETTERS},
    "eos": {"dg_key": "cosine-regression", "dg_args": {"add_eos": True, "dropout": 0.3}},
    "gru, dropout": {"rnn_key": "gru", "dropout": 0.3},
    "lstm, dropout": {"dropout": 0.3, "use_skip_connection": True, "use_layer_normalization": True},
    "embeddings": {
        "input_embedding_key": "nn_embedding",
        "input_embedded_size": 7,
        "dropout": 0.2,
        "prev_dirs_embedding_key": "nn_embedding",
        "prev_dirs_embedded_size": 3,
        "normalize_prev_dirs": True,
    },
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_members_are_separate_runs(options):
    members, states, losses, own_losses = train(torch.float64, 2, **options)
    for one, other in zip(members, states, strict=True):
        torch.testing.assert_close(flat(one), flat(other), rtol=1e-9, atol=1e-10)
    for one, other in zip(losses, own_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_members_in_float32_are_as_exact_as_separate_runs():
    """The truth is the same run in float64: ensemble and separate runs are equally far from it."""
    options = {"dropout": 0.2}
    members, states, _, _ = train(torch.float32, 8, **options)
    _, exact, _, _ = train(torch.float64, 8, **options)
    for one, other, truth in zip(members, states, exact, strict=True):
        error = (flat(one) - flat(truth)).norm() / flat(truth).norm()
        own_error = (flat(other) - flat(truth)).norm() / flat(truth).norm()
        assert own_error < 1e-4
        assert error < 3 * own_error + 1e-6


def test_the_decay_of_each_reaches_each():
    batches = load(1, torch.float64)
    loss_fn, states = start(torch.float64)
    states, decays = [states[0]] * 3, torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    rates = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)
    ensemble, _ = ensemble_step(
        stack_states(states), batches[0], loss_fn=loss_fn, optimizer=adam, lr=rates, weight_decay=decays
    )
    one = partial(train_step, batch=batches[0], loss_fn=loss_fn)
    for number, state in enumerate(states):
        optimizer = adam(weight_decay=decays[number].item())
        own, _ = one(state, optimizer=optimizer, lr=rates[number].item())
        torch.testing.assert_close(flat(member(ensemble, number)), flat(own), rtol=1e-9, atol=1e-10)
