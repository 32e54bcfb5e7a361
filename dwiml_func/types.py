"""The types that rooms share: parameters, buffers and optimizer state, as plain trees of tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["Buffers", "OptState", "Params"]

Params = Mapping[str, Tensor]
"""Trainable tensors by the module's own names."""

Buffers = Mapping[str, Tensor]
"""Tensors that the model uses and gradients do not change: buffers and frozen parameters, by the module's own names."""

OptState = Mapping[str, Mapping[str, Tensor]]
"""Moments by kind, then by parameter name: `{"exp_avg": {"weight": ...}}`. The update count is `TrainState.step`."""
