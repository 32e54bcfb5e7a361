"""Claims about `python -m benchmarks`: scripts run in turn, their verdicts make a table, and nothing fails unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import run_program

from benchmarks import __main__ as suite

GUARD = 'if __name__ == "__main__":\n    '
SCRIPTS = {
    "good": "print('pass: a step takes 0.36 times the bare loop, at most 0.4 is required')",
    "bad": "print('FAIL: 3.1 times faster than one | after the other, at least 4 required'); raise SystemExit(1)",
    "partial": "print('skip: Lightning is not installed')",
    "broken": "print('pass: the first of two, at most 1 required'); raise ValueError('no data')",
    "plain": "print('a table, and no requirement')",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, code in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(GUARD + code + "\n")
    (tmp_path / "shared.py").write_text("raise AssertionError('no benchmark')\n")
    monkeypatch.setattr(suite, "FOLDER", tmp_path)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        return suite.main()

    return call


def test_every_verdict_stands_in_the_table_with_what_was_measured_and_its_limit(run, tmp_path):
    assert run() == 1
    results = (tmp_path / "results.md").read_text()
    for row in (
        "| `bad` | 3.1 times faster than one / after the other | at least 4 | FAIL |",
        "| `broken` | the first of two | at most 1 | pass |",
        "| `broken` | exit code 1: ValueError: no data |  | did not finish |",
        "| `good` | a step takes 0.36 times the bare loop | at most 0.4 | pass |",
        "| `partial` | Lightning is not installed |  | not measured |",
        "| `plain` | no requirement |  |  |",
    ):
        assert f"\n{row}\n" in results
    assert "shared" not in results
    assert f"Python {sys.version.split()[0]}, torch " in results
    assert "a table, and no requirement" in results  # all that a script printed follows


@pytest.mark.parametrize(("name", "code"), [("good", 0), ("plain", 0), ("bad", 1), ("partial", 1), ("broken", 1)])
def test_only_requirements_that_were_all_measured_and_met_end_with_0(run, tmp_path, name, code):
    assert run(name) == code
    assert not (tmp_path / "results.md").exists()  # of all benchmarks: a choice does not replace it


def test_a_name_that_is_no_benchmark_is_refused_with_those_that_are(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("shared")
    assert "no benchmark is called shared. There are: bad, broken, good" in capsys.readouterr().err


def test_every_benchmark_can_be_imported():
    """Names that move in the package are renamed here too; what is measured is imported later."""
    run_program(f"import sys; sys.path.insert(0, {str(suite.FOLDER)!r}); import {', '.join(suite.scripts())}")


def test_the_fault_in_dwi_ml_s_gradients_is_seen():
    command = [sys.executable, str(suite.FOLDER / "dwi_ml_gradient.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("lines equal")) == (0, 2), done.stdout
    assert "an array that is copied: lines equal, 0 of 100 rows" in done.stdout
    assert "an array that is changed: lines equal, 90 of 100 rows" in done.stdout


def test_every_benchmark_has_a_row_with_its_command_in_the_readme():
    table = (suite.FOLDER / "README.md").read_text()
    for name in suite.scripts():
        row = next(
            (line for line in table.splitlines() if line.startswith(f"| `{name}.py` |")), f"no row for {name}.py"
        )
        assert f"| `python benchmarks/{name}.py" in row


@pytest.mark.soak
def test_the_benchmark_of_a_gpu_runs_without_one_and_judges_nothing(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(suite.FOLDER))
    import gpu  # pyright: ignore[reportMissingImports]

    assert gpu.main(["--device", "cpu", "--tiny"]) == 0
    out = capsys.readouterr().out
    for row in ("6 x LSTM 8+8 ", "6 x transformer ", "tiny MLP ", "2 MLPs ", "2 Learn2Track "):
        assert f"\n{row}" in out
    lines = [line for line in out.splitlines() if line.startswith(("skip: ", "pass: ", "FAIL: "))]
    assert len(lines) == 7
    assert all(line.endswith("not judged on cpu with --tiny") for line in lines)
    assert [text for passed, text in gpu.judge({}, None, tiny=False) if passed or "not measured" not in text] == []
    assert gpu.attempt("part", lambda: 1 // 0) is None
    assert capsys.readouterr().out == "failed: part: ZeroDivisionError: integer division or modulo by zero\n"
    if not gpu.torch.cuda.is_available():
        assert gpu.main([]) == 0
        assert "skip: no CUDA device was found" in capsys.readouterr().out
