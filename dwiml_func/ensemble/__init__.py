"""K runs as one value, trained at once under `torch.func.vmap`."""

from dwiml_func.ensemble.captured import capture_ensemble_step
from dwiml_func.ensemble.loop import EnsembleReport, train_and_validate_ensemble
from dwiml_func.ensemble.state import EnsembleState, member, member_sums, stack_states
from dwiml_func.ensemble.step import ensemble_eval_step, ensemble_step

__all__ = [
    "EnsembleReport",
    "EnsembleState",
    "capture_ensemble_step",
    "ensemble_eval_step",
    "ensemble_step",
    "member",
    "member_sums",
    "stack_states",
    "train_and_validate_ensemble",
]
