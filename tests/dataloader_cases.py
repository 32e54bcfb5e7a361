"""A dataset that worker processes can import."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset


class Noisy(Dataset):
    """Draws from every global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> list[float]:
        return [float(index), float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002
