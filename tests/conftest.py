"""What all tests share: one thread, and hypothesis without a clock and without chance."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # bits depend on the number of threads
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
