"""Training steps that `torch.compile` turns into one graph."""

from dwiml_func.compiled.step import jit_step

__all__ = ["jit_step"]
