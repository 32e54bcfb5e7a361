"""Recurrent networks on packed rows, fast on the CPU and under `torch.func`."""
