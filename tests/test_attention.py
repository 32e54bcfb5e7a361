"""Attention weights: torch's own are the truth, and `attention` writes them as matrices and coloured tractograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from experiment_cases import PHANTOM
from matplotlib import colormaps

from dwiml_func.data.hdf5.read import open_dataset
from dwiml_func.data.loader import BatchRequest, LoaderSpec, load_batch
from dwiml_func.models.transformers.transformer import Transformer
from dwiml_func.models.transformers.weights import attention_weights, summary_of

LOADERS: Any = nib.streamlines


def _batch(num: int = 1) -> Any:
    dataset = open_dataset(PHANTOM, "validation")
    return load_batch(BatchRequest(np.arange(num), None, 0, 0), dataset=dataset, spec=LoaderSpec())


@pytest.mark.parametrize("kind", ["tts", "ttst", "tto"])
def test_the_weights_are_those_of_torchs_own_attention_and_change_no_output(kind: Any) -> None:
    torch.manual_seed(2)
    target: dict[str, Any] = {"target_embedded_size": 4} if kind == "ttst" else {}
    model = Transformer(6, model=kind, input_embedded_size=8, nheads=2, n_layers_e=2, **target).eval()
    layers: Any = model.modified_torch_transformer
    batch = _batch()
    weights = attention_weights(model, batch)
    num = batch.num_points
    names = ["encoder_1", "encoder_2"] + ["decoder_1", "cross_1", "decoder_2", "cross_2"] * (kind == "tto")
    assert list(weights) == names
    for own in weights.values():
        torch.testing.assert_close(own.sum(2), torch.ones(2, num))
        assert own.triu(1).abs().max() == 0
    with torch.no_grad():
        x, _, _ = model.rows(batch)
        first = getattr(layers, "encoder", layers).layers[0].self_attn
        theirs = torch.nn.MultiheadAttention(x.shape[1], 2, batch_first=True)
        theirs.load_state_dict(first.state_dict())
        mask = torch.ones(num, num, dtype=torch.bool).triu(1)
        _, expected = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(weights["encoder_1"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Expected a batch of one streamline\. Received: 2"):
        attention_weights(model, _batch(2))


def test_summaries_follow_their_definitions() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.0], [0.5, 0.1, 0.4]])
    summary = summary_of(weights)
    torch.testing.assert_close(summary.mean_attention, torch.tensor([2.25 / 3, 0.35 / 2, 0.4]))
    torch.testing.assert_close(summary.importance, torch.tensor([2 / 3, 0.0, 1.0]))
    torch.testing.assert_close(summary.looked_far, torch.tensor([0.0, 1.0, 1.0]))


def test_the_command_writes_matrices_and_coloured_tractograms(cli, tmp_path: Path) -> None:
    options = ("--input-embedded-size", 8, "--nheads", 2, "--n-layers-e", 1, "--max-epochs", 1, "--skip-window-lag")
    assert cli("train", tmp_path, "run", PHANTOM, "--model", "tts", *options).code == 0
    given = (tmp_path / "run", PHANTOM, tmp_path / "out", "--subject", "subj2")
    cli("attention", *given, "--ids", 100000).check_refusal("ids: expected numbers from 0 to")
    assert not (tmp_path / "out").exists()
    outcome = cli("attention", *given, "--ids", 0, 3)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{tmp_path / 'out'}: 2 streamlines, attentions encoder_1\n"
    assert (tmp_path / "out" / "matrices_3.png").read_bytes().startswith(b"\x89PNG")
    from dwiml_func.experiment.model_store import load_model

    model = load_model(tmp_path / "run" / "best_model").module
    assert isinstance(model, Transformer)
    expected = summary_of(attention_weights(model, _batch())["encoder_1"].mean(0))
    for name in ("mean_attention", "importance", "looked_far"):
        tractogram = LOADERS.load(tmp_path / "out" / f"encoder_1_{name}.trk").tractogram
        assert len(tractogram.streamlines) == 2
        values = np.asarray(tractogram.data_per_point[name][0])[:, 0]
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-4, atol=1e-6)
        both, colours = (np.concatenate(list(tractogram.data_per_point[key])) for key in (name, "color"))
        share = both[:, 0] / (both.max() or 1)
        np.testing.assert_allclose(colours, 255 * colormaps["viridis"](share)[:, :3], atol=1)


def test_a_model_without_attention_is_refused(cli, experiments: Path, tmp_path: Path) -> None:
    outcome = cli("attention", experiments / "run", PHANTOM, tmp_path / "out", "--subject", "subj2")
    outcome.check_refusal("Expected a transformer. Received: Learn2Track, which has no attention")
