"""Claims about `--matmul-precision`: TF32 is never a silent default, and the run's choice is set and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dwiml_func.core.precision import MatmulPrecision, set_matmul_precision
from dwiml_func.experiment.folder import read_config

PHANTOM = Path(__file__).parent / "data" / "phantom.hdf5"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before, was_deterministic = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.deterministic = was_deterministic
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_products_and_cudnn_get_the_same_precision(precision: MatmulPrecision, tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = not tf32
    set_matmul_precision(precision)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.deterministic


def test_a_run_sets_and_records_its_precision_and_tf32_is_off_by_default(cli, tmp_path) -> None:
    small = ("--rnn-layer-sizes", "4", "--batch-size-training", "40", "--max-epochs", "1", "--skip-window-lag")
    torch.backends.cudnn.allow_tf32 = True  # torch's own default
    assert cli("train", tmp_path, "plain", PHANTOM, *small, "--skip-figures").code == 0
    assert not torch.backends.cudnn.allow_tf32
    assert read_config(tmp_path / "plain").training.matmul_precision == "highest"
    assert cli("train", tmp_path, "high", PHANTOM, *small, "--matmul-precision", "high").code == 0
    assert torch.backends.cudnn.allow_tf32
    assert read_config(tmp_path / "high").training.matmul_precision == "high"
    cli("train", tmp_path, "no", PHANTOM, "--matmul-precision", "tf32").check_refusal("--matmul-precision", "tf32")
