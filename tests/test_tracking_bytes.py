"""A line's bytes do not depend on the lines beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tracking_cases import FieldModel, positions

from dwiml_func.core.rng import Key, torch_rng
from dwiml_func.models import Learn2Track, Transformer
from dwiml_func.tracking import TrackingSpace, TrackingSpec, track
from dwiml_func.tracking.queue import SeedQueue, row_period
from dwiml_func.tracking.state import StepModel, init_track_state

SEEDS = 3 + 10 * torch.rand(1000, 3, generator=torch.Generator().manual_seed(1))
VOLUME = torch.randn(16, 16, 16, 28, generator=torch.Generator().manual_seed(2))
NUM_ROWS = 64


def lines_of(
    model: StepModel, algo: Any, numbers: list[int], *, num_blocks: int = 1, **options: Any
) -> dict[int, bytes]:
    space = TrackingSpace(volume=VOLUME, voxel_sizes=(2.0, 2.0, 2.0))
    spec = TrackingSpec(**{"step_size": 1, "min_length": 0, "max_length": 15, "theta": 120, "algo": algo, **options})
    wanted = torch.tensor(numbers)
    found = {}
    for tracked in track(
        SEEDS[wanted],
        model=model,
        space=space,
        spec=spec,
        key=Key(3),
        numbers=wanted,
        num_rows=NUM_ROWS,
        num_blocks=num_blocks,
    ):
        lines = [line.numpy().tobytes() for line in tracked.streamlines.to_list()]
        found |= dict(zip(tracked.seeds.tolist(), lines, strict=True))
    return found


@pytest.mark.parametrize(
    ("rnn_key", "algo", "dg_key"),
    [
        ("lstm", "det", "cosine-regression"),
        ("gru", "det", "sphere-classification"),
        ("gru", "prob", "gaussian"),
        ("lstm", "prob", "fisher-von-mises-mixture"),
    ],
)
def test_a_line_has_the_same_bytes_alone_among_ten_and_among_700(rnn_key, algo, dg_key):
    with torch_rng(Key(1)):
        sizes = (60, 50)  # rows of 25 numbers in the getter: every fourth one begins where a vector register does
        model = Learn2Track(28, rnn_key=rnn_key, rnn_layer_sizes=sizes, nb_previous_dirs=1, dg_key=dg_key).eval()
        for parameter in model.parameters():
            parameter.data *= 2  # lines that turn
    whole = lines_of(model, algo, list(range(700)))  # 512 rows are read at once
    assert len({len(line) for line in whole.values()}) > 8  # lines of many lengths: rows are filled at many times
    among_ten = lines_of(model, algo, list(range(7, 700, 70)))
    assert among_ten == {number: whole[number] for number in among_ten}
    assert len(among_ten) >= 8
    assert lines_of(model, algo, list(range(300)), num_blocks=3) == {n: whole[n] for n in whole if n < 300}
    for number in (0, 63, 131, 500, 699):
        assert lines_of(model, algo, [number]) == {n: line for n, line in whole.items() if n == number}


@pytest.mark.parametrize("kind", ["tts", "tto"])
def test_so_do_lines_of_transformers_with_keys_and_values_in_several_blocks(kind):
    with torch_rng(Key(1)):
        model = Transformer(28, model=kind, input_embedded_size=12, nheads=2, n_layers_e=1).eval()
    for parameter in model.direction_getter.parameters():
        parameter.data *= 3  # lines that turn
    longest = 90  # points, of some lines: two blocks
    whole = lines_of(model, "det", list(range(200)), max_length=longest, theta=180)
    assert max(len(line) for line in whole.values()) > 64 * 12
    among_few = lines_of(model, "det", list(range(3, 200, 40)), max_length=longest, theta=180)
    assert among_few == {number: whole[number] for number in among_few}
    assert len(among_few) >= 4


class UnevenModel(FieldModel):
    """Rounds differently in the rows after the first `period`, and again after twice as many."""

    def __init__(self, period: int) -> None:
        super().__init__(lambda inputs: inputs)
        self.period = period

    def run_step(self, inputs: Tensor, dirs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        place = torch.arange(len(inputs))[:, None] % self.period
        return inputs[:, :3] * (1 + place * 2.0**-23), {"count": inputs[:, 0]}


@pytest.mark.parametrize(("num_rows", "period", "expected"), [(96, 1, 16), (96, 48, 48), (96, 32, 32), (80, 32, 80)])
def test_lines_change_places_only_with_rows_that_round_alike(num_rows, period, expected):
    model, spec = UnevenModel(period), TrackingSpec(step_size=1)
    space = TrackingSpace(volume=VOLUME, voxel_sizes=(2.0, 2.0, 2.0))
    state = init_track_state(model, space, spec, key=Key(1), num_rows=num_rows)
    assert row_period(state, model=model, space=space, spec=spec) == expected


def test_seeds_wait_for_any_row_of_their_kind():
    queue = SeedQueue(torch.arange(100), 16, 4)
    rows, indices = queue.take(0, 16)
    assert (rows % 4 == indices % 4).all()
    assert sorted(indices.tolist()) == list(range(16))
    is_live = torch.ones(16, dtype=torch.bool)
    is_live[[1, 9, 6]] = False
    assert sorted(queue.release(0, is_live).tolist()) == [1, 6, 9]
    rows, indices = queue.take(0, 16)
    assert dict(zip(rows.tolist(), indices.tolist(), strict=True)) == {1: 17, 9: 21, 6: 18}
    while not queue.is_empty:
        rows, indices = queue.take(0, 16)
        assert (rows % 4 == indices % 4).all()
        queue.release(0, torch.zeros(16, dtype=torch.bool))


def test_other_keys_give_other_samples_and_the_same_key_the_same():
    with torch_rng(Key(1)):
        model = Learn2Track(28, rnn_layer_sizes=(8,), dg_key="gaussian").eval()
    space = TrackingSpace(volume=VOLUME, voxel_sizes=(2.0, 2.0, 2.0))
    spec = TrackingSpec(step_size=1, min_length=0, max_length=20, algo="prob", theta=180)

    def points(seed):
        results = track(SEEDS[:20], model=model, space=space, spec=spec, key=Key(seed), num_rows=32)
        return torch.cat([tracked.streamlines.points for tracked in results])

    first = points(1)
    assert torch.equal(points(1), first)
    assert not torch.equal(points(2)[:20], first[:20])


def test_memory_holds_a_bounded_number_of_lines():
    # One line in a hundred is long; the others wait for the oldest one, and no more seeds are taken meanwhile.
    queue, num_rows = SeedQueue(torch.arange(10_000), 16, 16), 16
    taken = set()
    for _ in range(1000):
        _, indices = queue.take(0, 16)
        taken |= set(indices.tolist())
        is_live = torch.zeros(num_rows, dtype=torch.bool)
        is_live[0] = True  # seed 0 never ends
        queue.release(0, is_live)
    assert max(taken) == 8 * num_rows - 1

    space = positions(200, 9, 9)
    spec = TrackingSpec(step_size=1, min_length=0, track_forward_only=True)
    seeds = torch.tensor([[198.5 - 197 * (i % 100 == 0), 4.5, 4.5] for i in range(1000)])
    model = FieldModel(lambda p: torch.tensor([1.0, 0, 0]).expand(len(p), 3))
    counts = [len(t.seeds) for t in track(seeds, model=model, space=space, spec=spec, key=Key(1), num_rows=16)]
    assert sum(counts) == 1000
    assert max(counts) <= 8 * 16 + 16
