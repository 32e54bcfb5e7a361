"""Transformers that read a line's first half at once, beside reading it a point a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_transformers import F, _model, by_kind

from dwiml_func.core.rng import Key
from dwiml_func.data.streamlines import Streamlines
from dwiml_func.models.transformers.cache import copied
from dwiml_func.models.transformers.transformer import Transformer
from dwiml_func.tracking import TrackingMask, TrackingSpace, TrackingSpec, init_track_state, track, track_step
from dwiml_func.tracking.state import with_lines
from dwiml_func.tracking.window_lag import continue_lines

AXES = torch.meshgrid(*[torch.arange(16) / 5] * 3, indexing="ij")
FREQUENCIES = torch.randn(F, 3, generator=torch.Generator().manual_seed(0)).tolist()
WAVES = [torch.sin(a * AXES[0] + b * AXES[1] + c * AXES[2]) for a, b, c in FREQUENCIES]
VOLUME = 3 * torch.stack(WAVES, dim=3)
SEEDS = 5 + 6 * torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
LINES = torch.where(AXES[0] + AXES[1] < 5.5, 1.0, 0.0)


class Stepwise:
    """A transformer that cannot read several points at once."""

    def __init__(self, model: Transformer) -> None:
        self.nb_previous_dirs, self.direction_getter = model.nb_previous_dirs, model.direction_getter
        self.run_step, self.run_step_in_place = model.run_step, model.run_step_in_place


@by_kind
@pytest.mark.parametrize("options", [{}, {"sos_token_type": "repulsion100", "norm_first": True}])
def test_points_read_at_once_leave_the_state_that_steps_leave(kind: str, options: dict[str, Any]) -> None:
    if kind == "tts" and options:
        return
    model = _model(kind, **options).eval()
    inputs, dirs = torch.randn(140, 3, F), torch.randn(140, 3, 3 * model.nb_previous_dirs)
    with torch.no_grad():
        state, fresh = None, None
        for step in range(135):  # three blocks
            _, state = model.run_step_in_place(inputs[step], dirs[step], state)
        assert state is not None
        beside = copied(state)
        # The second line turns: it is read backwards, into two blocks that hold its earlier keys and values.
        back, back_dirs = inputs[:70, 1].flip(0), dirs[:70, 1].flip(0)
        for step in range(70):
            _, fresh = model.run_step_in_place(back[step, None], back_dirs[step, None], fresh)
        turned = model.prefill(back, back_dirs, state.forget(torch.tensor([False, True, False])), 1)
        assert turned.num_read.tolist() == [135, 70, 135]
        for step in range(135, 140):
            outputs, turned = model.run_step_in_place(inputs[step], dirs[step], turned)
            expected, fresh = model.run_step_in_place(inputs[step, 1:2], dirs[step, 1:2], fresh)
            others, beside = model.run_step_in_place(inputs[step], dirs[step], beside)
            torch.testing.assert_close(outputs[1:2], expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(outputs[::2], others[::2])


def test_a_step_in_which_lines_turn_leaves_the_state_before_it_as_it_was() -> None:
    model, spec = _model("tto").eval(), TrackingSpec(step_size=1)
    space = TrackingSpace(volume=VOLUME, voxel_sizes=(2.0, 2.0, 2.0))
    state = init_track_state(model, space, spec, key=Key(1), num_rows=4)
    state = with_lines(state, torch.arange(3), torch.arange(3), SEEDS[:3])
    while not (state.turn[:3] > 0).all():
        kept, before = copy.deepcopy(state), state
        state = track_step(before, model=model, space=space, spec=spec)
        for name in ("points", "cursor", "position", "dirs"):
            assert torch.equal(getattr(before, name), getattr(kept, name))
        torch.testing.assert_close(before.model_state, kept.model_state, atol=0, rtol=0)
    assert len(state.turn[:3].unique()) == 3  # in different steps


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("ttst", {}, {"theta": 40}),
    "mask": ("ttst", {}, {"discard_last_point": True}),
    "EOS": ("tts", {"dg_args": {"add_eos": True}}, {"eos_stop": 0.55}),
    "max length": ("tto", {}, {"max_length": 20}),
    "samples": ("ttst", {"dg_key": "fisher-von-mises"}, {"algo": "prob"}),
    "sampled classes": ("tto", {"dg_key": "sphere-classification"}, {"algo": "prob", "theta": 120}),
}


@pytest.mark.parametrize("case", CASES)
def test_lines_are_those_of_reading_the_first_half_a_point_a_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, rules = CASES[case]
    model = _model(kind, **options).eval()
    for parameter in model.parameters():
        parameter.data *= 1.8  # lines that depend on what was read before
    voxel_sizes = (2.0, 2.0, 2.0) if case == "EOS" else (2.0, 2.5, 2.0)
    mask = TrackingMask(values=LINES) if case == "mask" else None
    space = TrackingSpace(volume=VOLUME, voxel_sizes=voxel_sizes, mask=mask)
    spec = TrackingSpec(**{"step_size": 1, "min_length": 0, "max_length": 80, "theta": 60, **rules})
    num_turned, prefill = [], Transformer.prefill

    def counted(self: Transformer, inputs: Any, *others: Any) -> Any:
        num_turned.append(len(inputs))
        return prefill(self, inputs, *others)

    monkeypatch.setattr(Transformer, "prefill", counted)

    def lines_of(model: Any) -> list[torch.Tensor]:
        found = track(SEEDS, model=model, space=space, spec=spec, key=Key(3), num_rows=16)
        return [line for tracked in found for line in tracked.streamlines.to_list()]

    lines = lines_of(model)
    num = len(num_turned)
    assert num >= 10
    expected = lines_of(Stepwise(model))
    assert len(num_turned) == num
    assert [len(line) for line in lines] == [len(line) for line in expected]
    torch.testing.assert_close(torch.cat(lines), torch.cat(expected), atol=1e-5, rtol=0)


def test_lines_continue_from_given_ones_as_after_a_point_a_step() -> None:
    model = _model("tto").eval()
    for parameter in model.parameters():
        parameter.data *= 1.8
    space = TrackingSpace(volume=VOLUME, voxel_sizes=(2.0, 2.0, 2.0))
    spec = TrackingSpec(step_size=0.2, theta=180)
    given = Streamlines.from_list(
        [SEEDS[number] + torch.arange(num)[:, None] / 40 for number, num in enumerate((1, 2, 30, 90))]
    )
    found, expected = (
        continue_lines(given, model=each, space=space, spec=spec, distance=3) for each in (model, Stepwise(model))
    )
    assert found.lengths.tolist() == expected.lengths.tolist() == [16, 16, 16, 16]
    torch.testing.assert_close(found.points, expected.points, atol=1e-5, rtol=0)
