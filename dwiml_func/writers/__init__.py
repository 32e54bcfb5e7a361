"""What is written about a run: logs, parameters, progress. Writers are callables on `EpochReport`s, see `writer`."""
