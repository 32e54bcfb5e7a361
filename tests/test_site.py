"""The site: one command builds it without a warning and without network, and it shows every public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from preloaded import finished, start_program

pytest.importorskip("mkdocs", reason='the site needs pip install -e ".[docs]"')

ROOT = Path(__file__).parents[1]
MKDOCS = "from mkdocs.__main__ import cli; cli()"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of each page of the site. `--strict` refuses a dead link or anchor, and a page without a place."""
    site = tmp_path_factory.mktemp("site")
    arguments = ("build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", site)
    blocked = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**blocked, "NO_MKDOCS_2_WARNING": "1"}
    done = finished(start_program(MKDOCS, *arguments, environment=environment, folder=ROOT))
    assert (done.returncode, "WARNING" in done.err) == (0, False), done.err
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


@pytest.mark.soak
def test_a_reader_takes_nothing_from_the_network(pages: dict[str, str]) -> None:
    tags = {name: re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text) for name, text in pages.items()}
    outside = [(name, tag) for name, found in tags.items() for tag in found if re.search(r"=\"?(https?:)?//", tag)]
    assert outside == []


@pytest.mark.soak
def test_every_public_name_has_its_entry_once(pages: dict[str, str], hooks: ModuleType) -> None:
    entries = [i for text in pages.values() for i in re.findall(r'<h2 id="(dwiml_func\.[\w.]+)" class="doc', text)]
    public = {identifier for names in hooks.public_names().values() for identifier in names.values()}
    assert sorted(entries) == sorted(public)


@pytest.mark.soak
def test_examples_are_code_and_arguments_are_tables(pages: dict[str, str]) -> None:
    text = pages["reference/optim.html"]
    assert "&gt;&gt;&gt; " not in re.sub(r"<pre.*?</pre>|<code.*?</code>", "", text, flags=re.DOTALL)
    assert text.count("doc-section-title") > 60  # parameters, returns, raises and examples of 30 names


def test_every_name_of_the_reference_imports_from_its_package(hooks: ModuleType) -> None:
    names = hooks.public_names()
    assert {"dwiml_func", "dwiml_func.optim", "dwiml_func.models", "dwiml_func.tracking"} <= set(names)
    for package, identifiers in names.items():
        for name, identifier in identifiers.items():
            module, _, attribute = identifier.rpartition(".")
            offered = getattr(importlib.import_module(package), name)
            assert getattr(importlib.import_module(module), attribute) is offered, identifier


def test_each_package_has_its_place_in_the_contents(hooks: ModuleType) -> None:
    contents = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    places = re.findall(r"reference/(\w+)\.md", contents)
    assert sorted(places) == sorted(package.rpartition(".")[2] for package in hooks.public_names())
