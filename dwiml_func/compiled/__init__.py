"""Training steps compiled whole: by `torch.compile` as one graph (`graph`), or captured as CUDA graphs (`replay`)."""

from dwiml_func.compiled.step import jit_step

__all__ = ["jit_step"]
