"""What is written about a run: logs, parameters, progress. Each writer is fed with `EpochReport`s."""
