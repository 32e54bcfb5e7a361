"""Batches cut into shards, and processes that train together."""

from dwiml_func.distributed.process_group import ProcessLostError, join_process_group
from dwiml_func.distributed.sharding import SINGLE_PROCESS, ProcessGroup, sharded_loss, sharded_value_and_grad

__all__ = [
    "SINGLE_PROCESS",
    "ProcessGroup",
    "ProcessLostError",
    "join_process_group",
    "sharded_loss",
    "sharded_value_and_grad",
]
