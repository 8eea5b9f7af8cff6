"""What mkdocs.yml asks of us: the package where griffe finds it, and the links of the pages.

MkDocs calls these by their names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from check_types import INSTALLED, ROOT
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_links import BEYOND, DOCS, file_of, for_the_site, linked_beyond, page_of, place_of

SOURCES = ROOT / "build" / "site_sources"
PACKAGE = "vla_trqam"


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Lays the package out as it is imported: `adapters` is not where its name says.

    Copied, as griffe follows no links; and so early, as griffe looks once which folders there are.
    """
    shutil.rmtree(SOURCES, ignore_errors=True)
    for folder in ("", *INSTALLED):
        _copy_modules(ROOT / (folder or PACKAGE), SOURCES / PACKAGE / folder)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of files outside ``docs/``."""
    named = [file_of(place, ROOT) for place in _places(config.nav) if place.startswith(BEYOND)]
    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    for file in sorted({*named, *linked_beyond([*pages, *named], ROOT)}):
        files.append(File.generated(config, place_of(file), content=page_of(file, ROOT)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes a page's links for the site."""
    return for_the_site(markdown, file_of(page.file.src_uri, ROOT), ROOT)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names sources by where they are, not by where griffe read them."""
    for folder in INSTALLED:
        html = html.replace(f"build/site_sources/{PACKAGE}/{folder}/", f"{folder}/")
    return html.replace("build/site_sources/", "")


def _copy_modules(folder: Path, copy: Path) -> None:
    for path in folder.rglob("*.py"):
        place = copy / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _places(nav: Any) -> list[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or ()
    return [place for part in parts for place in _places(part)]
