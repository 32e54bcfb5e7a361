"""The pages of the site that are no files in `docs/`: the README, the API reference, the notebooks, the benchmarks."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import dwiml_func

ROOT = Path(__file__).parents[2]


def public_names() -> dict[str, dict[str, str]]:
    """For each package that has an `__all__`: its names, and where the reference documents each."""
    packages = ["dwiml_func", *(f"dwiml_func.{info.name}" for info in pkgutil.iter_modules(dwiml_func.__path__))]
    found = {package: _identifiers(package) for package in packages if not package.rpartition(".")[2].startswith("_")}
    return {package: names for package, names in found.items() if names and package != "dwiml_func.types"}


def _identifiers(package: str) -> dict[str, str]:
    module = importlib.import_module(package)
    return {name: _identifier(package, name, getattr(module, name)) for name in getattr(module, "__all__", ())}


def _identifier(package: str, name: str, value: Any) -> str:
    """Where a name is defined, as its value knows; for what does not know, as the package imports it."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{name}"
    member = _module(package)[name]
    return _identifier(member.target_path.rpartition(".")[0], name, value) if member.is_alias else f"{package}.{name}"


@functools.cache
def _module(name: str) -> Any:
    path = Path(inspect.getfile(importlib.import_module(name)))
    return griffe.visit(name, filepath=path, code=path.read_text())


def _summary(identifier: str) -> str:
    """The first paragraph of a docstring, in one line."""
    module, _, name = identifier.rpartition(".")
    docstring = _module(module)[name].docstring
    return " ".join(docstring.value.partition("\n\n")[0].split()).replace("|", "\\|") if docstring else ""


def _reference_pages() -> dict[str, str]:
    """The page of each package: a table of its names, and below it those that no other package offers."""
    packages = public_names()
    offered = {i for package, names in packages.items() if package != "dwiml_func" for i in names.values()}
    pages = {}
    for package, names in packages.items():
        rows = [f"| [`{name}`][{i}] | {_summary(i)} |" for name, i in sorted(names.items())]
        table = "\n".join(["| name | what it is |", "|---|---|", *rows])
        own = [f"::: {i}" for i in names.values() if package != "dwiml_func" or i not in offered]
        text = [f"# {package}", inspect.getdoc(importlib.import_module(package)) or "", table, *own]
        pages[f"reference/{package.rpartition('.')[2]}.md"] = "\n\n".join(text)
    return pages


def _notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code and what that printed and drew."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"[This notebook as a file]({path.name})"])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![What the cell draws](data:image/png;base64,{''.join(''.join(data['image/png']).split())})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Each guide has its place in the contents, also one that `mkdocs.yml` does not name."""
    named = json.dumps(config.nav)
    (guides,) = (entry["Guides"] for entry in config.nav or () if "Guides" in entry)
    guides += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f'"{path.name}"' not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the figures that pages show."""

    def add(uri: str, **content: Any) -> None:
        files.append(File.generated(config, uri, **content))

    for uri, text in _reference_pages().items():
        add(uri, content=text)
    add("index.md", content=(ROOT / "README.md").read_text().replace("](docs/", "]("))
    add("changelog.md", content=(ROOT / "CHANGELOG.md").read_text())
    add("CITATION.cff", abs_src_path=str(ROOT / "CITATION.cff"))
    for path in sorted((ROOT / "benchmarks").glob("*.png")) + sorted((ROOT / "benchmarks").glob("*.md")):
        add(f"benchmarks/{path.name}", abs_src_path=str(path))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        add(f"notebooks/{path.stem}.md", content=_notebook_page(path))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Figures outside `docs/` have their place in the site, and notebooks are pages."""
    return re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown.replace("](../benchmarks/", "](benchmarks/"))


class ExampleSections(griffe.Extension):
    """`Example:` of our docstrings is what griffe calls `Examples:`; without it `>>>` would be three quotations."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
