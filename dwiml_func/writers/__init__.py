"""Writers log a run. A writer is any callable on `EpochReport`s; `fan_out` joins several."""

from dwiml_func.writers.comet import Comet
from dwiml_func.writers.jsonl import jsonl
from dwiml_func.writers.npy import npy
from dwiml_func.writers.progress import Progress
from dwiml_func.writers.steps import log_steps, read_scalars
from dwiml_func.writers.tensorboard import tensorboard
from dwiml_func.writers.writer import StepWriter, Writer, fan_out

__all__ = [
    "Comet",
    "Progress",
    "StepWriter",
    "Writer",
    "fan_out",
    "jsonl",
    "log_steps",
    "npy",
    "read_scalars",
    "tensorboard",
]
