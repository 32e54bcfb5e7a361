"""Recurrent layers on packed rows: fast on CPU and CUDA, under `torch.func` and in `torch.compile`.

Read `packing` first (the layout of the rows), then `stacked` (the modules), which runs each layer by one of four scans:
`scan` (plain torch operations, the definition), `autograd` (on `kernels`, gradients by hand), `cudnn` and `custom_ops`
(for `torch.compile`). All four compute the same.
"""
