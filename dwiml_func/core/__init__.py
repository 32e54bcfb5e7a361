"""The training state, the steps and the loop: pure functions of values."""
