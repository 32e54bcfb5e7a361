"""Graphs of logs that a user names: `TITLE LOG ... [YMIN YMAX]`, with `diff(a, b)` and `sum(a, b)`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwiml_func._checks import truncated_repr
from dwiml_func.core.report import EpochReport
from dwiml_func.experiment.comparison.run_labels import kind_names
from dwiml_func.experiment.comparison.run_values import check_known, find_log, log_names
from dwiml_func.experiment.figures.panel import COLOURS, Panel, PlottedRun
from dwiml_func.experiment.figures.run_panels import PanelDrawing

__all__ = ["Graph", "graph_drawings", "parse_graph"]

_STYLES = ("-", "--", ":", "-.")


class Term(NamedTuple):
    """A log, or an operation ("diff" or "sum") on two terms; `text` is as the user wrote it."""

    text: str
    operation: str = ""
    terms: tuple[Term, ...] = ()


class Graph(NamedTuple):
    """A graph of logs, and the limits of its y axis."""

    title: str
    terms: tuple[Term, ...]
    limits: tuple[float, float] | None = None


def parse_graph(words: Sequence[str]) -> Graph:
    """A graph from the words of a command line; ValueError where they are none."""
    numbers = [_number(word) for word in words]
    limits = None
    if len(words) > 3 and None not in numbers[-2:]:
        low, high = (float(number) for number in numbers[-2:] if number is not None)
        if not low < high:
            raise ValueError(f"--graph: expected YMIN below YMAX. Received: {' '.join(words[-2:])}.")
        words, limits = words[:-2], (low, high)
    if len(words) < 2 or any(_number(word) is not None for word in words[1:]):
        raise ValueError(
            f'--graph: expected "TITLE" LOG [LOG ...] [YMIN YMAX]. Received: {truncated_repr(" ".join(words))}.'
        )
    return Graph(words[0], tuple(map(_parse_term, words[1:])), limits)


def graph_drawings(graph: Graph, runs: Sequence[PlottedRun]) -> list[PanelDrawing]:
    """The panels of a graph: one, or one for each kind of loss where its logs are losses that cannot be compared.

    ValueError where no run has a log.
    """
    for name in (leaf for term in graph.terms for leaf in _leaves(term)):
        if all(find_log(run.history, name) is None for run in runs):
            known = dict.fromkeys(name for run in runs for name in log_names(run.history))
            hint = " EXPERIMENT_DIRs stand before --graph." if "/" in name else ""
            check_known(name, [*known], what="--graph: expected a log of these runs", hint=hint)
    has_loss = any("loss" in leaf for term in graph.terms for leaf in _leaves(term))
    kinds: list[Mapping[str, str]] = []
    for run in runs:
        if not has_loss:
            kinds = [{}]
        elif run.loss_kind not in kinds:
            kinds.append(run.loss_kind)
    drawings = []
    for kind, text in zip(kinds, kind_names(kinds), strict=True):
        shown = {n: run for n, run in enumerate(runs) if not has_loss or run.loss_kind == kind}
        title = graph.title if len(kinds) == 1 else f"{graph.title}: {text}"
        if any(_evaluate(term, run.history) is not None for term in graph.terms for run in shown.values()):
            drawings.append(PanelDrawing("graph", shown, partial(_draw, graph=graph, title=title), graph.limits))
    return drawings


def _draw(panel: Panel, runs: dict[int, PlottedRun], *, graph: Graph, title: str) -> None:
    panel.name(title, graph.terms[0].text if len(graph.terms) == 1 else "")
    for number, run in runs.items():
        for place, term in enumerate(graph.terms):
            values = _evaluate(term, run.history)
            if values is not None:
                style = {"linestyle": _STYLES[place % len(_STYLES)], "colour": COLOURS[place % len(COLOURS)]}
                panel.curve(run, values.tolist(), number, term.text, linewidth=2, **style)


def _evaluate(term: Term, history: Sequence[EpochReport]) -> NDArray[np.float64] | None:
    """The values of a term, one an epoch; None where the run lacks a log."""
    if not term.operation:
        return find_log(history, term.text)
    a, b = (_evaluate(each, history) for each in term.terms)
    if a is None or b is None:
        return None
    return a - b if term.operation == "diff" else a + b


def _leaves(term: Term) -> list[str]:
    return [leaf for each in term.terms for leaf in _leaves(each)] if term.operation else [term.text]


def _parse_term(text: str) -> Term:
    text = text.strip()
    call = re.fullmatch(r"(diff|sum)\s*\((.*)\)", text)
    if call is None:
        if not text or re.search(r"[(),]", text):
            raise ValueError(f"--graph: expected a log, diff(LOG, LOG) or sum(LOG, LOG). Received: {text!r}.")
        return Term(text)
    parts = _arguments(call[2])
    if len(parts) != 2:
        raise ValueError(f"--graph: expected {call[1]}(LOG, LOG), with two logs. Received: {text!r}.")
    terms = tuple(map(_parse_term, parts))
    return Term(f"{call[1]}({', '.join(term.text for term in terms)})", call[1], terms)


def _arguments(text: str) -> list[str]:
    """What stands between the commas that are in no parentheses."""
    depth, parts = 0, [""]
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
