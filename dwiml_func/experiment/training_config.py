"""How a run trains: epochs, optimizer, learning rate, random numbers and hardware, as command-line options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from dwiml_func._checks import STRICT, check_number
from dwiml_func.core.interval import validation_interval
from dwiml_func.core.precision import MatmulPrecision
from dwiml_func.core.skip_batches import parse_batch
from dwiml_func.experiment.learning_rate import parse_learning_rate
from dwiml_func.experiment.optimizers import OptimizerName, configured_optimizer
from dwiml_func.types import Schedule

__all__ = ["PHASE_METRICS", "WINDOW_LAG", "TrainingConfig"]

PHASE_METRICS = ("tracking_mean_final_distance", "tracking_connectivity_score", "tracking_missing_connections")
"""The metrics of the tracking phase."""

WINDOW_LAG = "tracking_window_lag"
"""The name of the window lag: mm, mean over windows."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training."""

    __pydantic_config__: ClassVar = STRICT

    max_epochs: int = 100
    """Number of epochs after which training ends."""
    patience: int | None = None
    """Number of validations in a row without improvement after which training ends. None: early stopping is off."""
    patience_delta: float = 1e-6
    """Least improvement of the monitored metric that counts."""
    monitor: str = "loss"
    """Metric that decides the best epoch: loss, angular_error, or any other of the validation."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher value of the monitored metric is better."""
    validate_every: str = "1epoch"
    """Interval between validations: "3epochs", or "500batches" (also at each epoch's end)."""
    optimizer: OptimizerName = "Adam"
    """Optimizer, as in torch.optim. Muon updates matrices, and AdamW the rest. ScheduleFree optimizers evaluate with an
    average, and take a constant learning rate."""
    momentum: float | None = None
    """Momentum of SGD, RMSprop, Muon or ScheduleFreeSGD. None: 0, 0, 0.95 or 0.9."""
    rule: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="RULE")] = ()
    """Options of some parameters, by name: "PATTERN: NAME=VALUE, ..." or "PATTERN: frozen". Options are those of the
    optimizer, and lr, a factor of the learning rate. The first rule that matches a parameter counts; "none" removes the
    rules of --config or of a fork's source. (default: none)"""
    accumulate: int = 1
    """Number of batches whose mean gradient, weighted by points, makes one optimizer step."""
    ema: float | None = None
    """Decay of an average of the parameters after each step, such as 0.999, to validate with and to save as the best
    model. None: no average."""
    skip_not_finite: int | None = None
    """Number of batches in a row whose loss or gradient may be NaN or infinite: they are skipped. None: the first one
    ends the training."""
    skip_batches: Annotated[tuple[str, ...], tyro.conf.arg(metavar="EPOCH:BATCH")] = ()
    """Batches to leave out, such as 12:40, the 40th batch of epoch 12. (default: none)"""
    learning_rate: tuple[str, ...] = ("0.001",)
    """Learning rate. "0.001*3 0.0001" means three epochs at 0.001, then 0.0001. Or a schedule: "cosine RATE LENGTH
    [FINAL_RATE]", "wsd PEAK WARMUP STABLE DECAY [FINAL_RATE]", "onecycle PEAK LENGTH", "plateau RATE FACTOR PATIENCE".
    "warmup LENGTH" may stand before rates, cosine and plateau. Lengths are epochs; with "steps" as the last word they
    are batches: "warmup 500 cosine 0.001 20000 steps"."""
    weight_decay: float = 0.01
    """L2 penalty on the parameters (AdamW: decoupled)."""
    clip_grad: float | None = None
    """Maximum norm of the gradient; a larger gradient is scaled down to it. None: no limit."""
    rng: int = 1234
    """Seed of all random numbers."""
    data_rng: int | None = None
    """Seed of the batches only: choice and order of streamlines, splitting, reversal, noise. None: --rng."""
    use_gpu: bool = False
    """Train on the CUDA GPU."""
    num_threads: int = 1
    """Number of CPU threads of the computation. Of a run with shards they compute shards side by side, and any number
    gives bitwise identical results; without shards, results depend on it."""
    compile: bool = False
    """Compile the training step with torch.compile; on a GPU, replay it as CUDA graphs. Results are reproducible, but
    not bitwise identical to those without it."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the model's matrix products and convolutions in training and validation; bf16 is autocast to
    bfloat16. Parameters, gradients, optimizer state, losses and the final model stay in float32."""
    device_data: Literal["auto", "on", "off"] = "auto"
    """Keep streamlines and volumes in the device's memory and make batches there. auto: on a GPU, where they fit into
    half of its free memory and are not lazy; otherwise batches made on the CPU are copied ahead. Points are the same;
    interpolated inputs, and points that are resampled, are equal to rounding."""
    pad_batches: Literal["auto", "on", "off"] = "auto"
    """Pad the streamlines of a batch to one of 8 lengths in recurrent layers and in attention: faster on a GPU, which
    then never waits for lengths. auto: on a GPU. Results are equal to rounding; dropout takes other random numbers."""
    matmul_precision: MatmulPrecision = "highest"
    """Precision of float32 matrix products: highest is float32; high allows TF32 on GPUs that have it; medium allows
    bfloat16 within products where the processor has it. It is set for cuBLAS, cuDNN and oneDNN alike."""
    skip_window_lag: bool = False
    """Do not measure the window lag at validations: the mean distance in mm between model and real streamline, where
    the model reads up to 60 mm of it and continues alone for 20 mm. It does not change the training."""
    add_a_tracking_validation_phase: bool = False
    """At validations, also let the model continue the first segments of validation streamlines, and compare where they
    end: distance in mm; connections, where the dataset has connectivity matrices. It does not change the training."""
    tracking_phase_frequency: int = 1
    """Number of epochs from one tracking phase to the next."""
    tracking_phase_nb_segments_init: int = 1
    """Number of segments of each streamline that the model reads before it continues alone, in the tracking phase."""
    tracking_mask: str | None = None
    """Name of the volume group that is the mask of the tracking phase, which requires it. None: no phase."""
    num_shards: int = 1
    """Number of shards of each batch. Under torchrun, the processes share them; any number of processes that divides
    this number gives bitwise identical results."""

    def __post_init__(self) -> None:
        check_number("max_epochs", self.max_epochs, at_least=1)
        check_number("patience", self.patience, at_least=1)
        check_number("patience_delta", self.patience_delta, at_least=0)
        validation_interval(self.validate_every)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("clip_grad", self.clip_grad, above=0)
        check_number("accumulate", self.accumulate, at_least=1)
        check_number("skip_not_finite", self.skip_not_finite, at_least=1)
        for text in self.skip_batches:
            parse_batch(text)
        if self.rule == ("none",):
            object.__setattr__(self, "rule", ())
        check_number("num_threads", self.num_threads, at_least=1, below=1 << 12)
        check_number("num_shards", self.num_shards, at_least=1, below=1 << 16)
        check_number("tracking_phase_frequency", self.tracking_phase_frequency, at_least=1)
        check_number("tracking_phase_nb_segments_init", self.tracking_phase_nb_segments_init, at_least=1)
        if self.add_a_tracking_validation_phase and self.tracking_mask is None:
            raise ValueError("add_a_tracking_validation_phase: requires tracking_mask, the name of a volume group.")
        if self.monitor in PHASE_METRICS and not (
            self.add_a_tracking_validation_phase and self.tracking_phase_frequency == 1
        ):
            raise ValueError(
                f"monitor: {self.monitor} requires add_a_tracking_validation_phase, with "
                "a tracking_phase_frequency of 1. To validate less often, use validate_every."
            )
        check_number("rng", self.rng, at_least=0, below=1 << 64)
        check_number("data_rng", self.data_rng, at_least=0, below=1 << 64)
        parse_learning_rate(" ".join(self.learning_rate))
        configured_optimizer(self)

    @property
    def num_operation_threads(self) -> int:
        """Number of threads of one operation; of a run with shards, threads share the shards instead."""
        return self.num_threads if self.num_shards == 1 else 1

    @property
    def pads(self) -> bool:
        """Whether batches are padded to one of few lengths."""
        return self.pad_batches == "on" or (self.pad_batches == "auto" and self.use_gpu)

    @property
    def captures(self) -> bool:
        """Whether training steps are CUDA graphs, which need batches of few shapes."""
        return self.compile and self.use_gpu and self.num_shards == 1

    @property
    def step_clip_grad(self) -> float | None:
        """Maximum norm of the gradient of each batch; None where `clip_grad` limits the mean of several batches."""
        return self.clip_grad if self.accumulate == 1 else None

    @property
    def judging(self) -> dict[str, Any]:
        """The options of `train_and_validate` that decide the best epoch; patience apart."""
        return {
            "patience_delta": self.patience_delta,
            "monitor": self.monitor,
            "mode": self.monitor_mode,
            "validate_every": self.validate_every,
        }

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate."""
        return parse_learning_rate(" ".join(self.learning_rate))
