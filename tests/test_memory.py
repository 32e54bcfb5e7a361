"""Claims about memory that is kept for the next step: no page of it is asked for again; the environment decides."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dwiml_func.core import memory

PROGRAM = """
import resource, runpy, sys
import numpy as np
is_kept = sys.argv[2] == "kept" and runpy.run_path(sys.argv[1])["keep_freed_memory"]()
def step():
    tensors = [np.ones(1 << 19) for _ in range(4)]  # 4 MB each
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **more: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | more
    command = [sys.executable, "-c", PROGRAM, memory.__file__, how]
    is_kept, faults = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    return is_kept, int(faults)


def test_no_page_is_asked_for_again() -> None:
    is_kept, faults = run("kept")
    if is_kept == "False":
        pytest.skip("this C library is not glibc")
    assert faults < 1000  # of 20 times 4 x 1024 pages
    assert run("default")[1] > 20 * 1024


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "no mallopt", "no library", "refused"])
def test_the_environment_and_the_library_decide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[int, int]] = []

    def library(_: None) -> object:
        if name == "no library":
            raise OSError
        return SimpleNamespace() if name == "no mallopt" else SimpleNamespace(mallopt=lambda *call: asked.append(call))

    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    for each in os.environ:
        if each.startswith("MALLOC_") or each == "GLIBC_TUNABLES":
            monkeypatch.delenv(each)
    if name.isupper():
        monkeypatch.setenv(name, "65536")
    assert memory.keep_freed_memory() is False
    assert asked == ([(-3, 32 << 20)] if name == "refused" else [])
