"""MkDocs hook: adds the pages at the repository's root, and points links outside docs/ to the source host.

The Markdown files link each other by their paths in the repository, so that the links also work where the files are
read without the site. A link to a file that does not exist is a warning, which `mkdocs build --strict` refuses.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, CONTRIBUTING.md and CHANGELOG.md as pages."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the relative links of a page for the site."""
    return _LINK.sub(lambda link: site_link(link[1], page.file.src_uri, config.extra["source"]), markdown)


def site_link(target: str, page: str, source_host: str) -> str:
    """The link from `page`, a path in the site, to what `target` names in the repository.

    >>> site_link("docs/models.md", "index.md", "https://host/repo")
    'models.md'
    >>> site_link("../../templates/dataflow.yaml", "dataflow/setup.md", "https://host/repo")
    'https://host/repo/blob/main/templates/dataflow.yaml'
    """
    path = posixpath.normpath(posixpath.join(source_folder(page), target))
    if path in ROOT_PAGES:
        return _relative(ROOT_PAGES[path], page)
    if path.startswith("docs/"):
        return _relative(path.removeprefix("docs/"), page)
    if not (ROOT / path).exists():
        _log.warning("%s: links to %s, which does not exist", page, path)
    return f"{source_host}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"


def source_folder(page: str) -> str:
    """The folder in the repository that holds a page's Markdown."""
    return "" if page in ROOT_PAGES.values() else posixpath.join("docs", posixpath.dirname(page))


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
