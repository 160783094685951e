"""MkDocs hook: pages from outside of docs/, and links that lead where they do in the repository.

README.md is the index; its links, and those of docs/, are relative to where each file lies. One to
another page becomes that page, one to a file of the code a copy of it, one to a folder its words.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
}
"""Pages that lie at the top of the repository, and where they are on the site."""
LINK = re.compile(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^():\s]+)\)|(!\[[^]]*\])\(([^():\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in BESIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in [*files.documentation_pages()]:
        for target in targets(page):
            path = (ROOT / source_of(page.src_uri)).parent / target
            inside = os.path.relpath(path, ROOT)
            if path.is_file() and inside not in BESIDE and not inside.startswith("docs/"):
                copy = f"source/{inside}.txt"
                if copy not in files.src_uris:
                    files.append(File.generated(config, copy, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **more: Any) -> str:
    here = source_of(page.file.src_uri)

    def led(found: re.Match[str]) -> str:
        words, target = (found[1], found[2]) if found[3] is None else (found[3], found[4])
        to = led_to(target, here, page.file.src_uri)
        if to is None:
            return words
        return f"[{words}]({to})" if found[3] is None else f"{words}({to})"

    return LINK.sub(led, markdown)


def led_to(target: str, source: str, uri: str) -> str | None:
    """From a page of `source` to where `target` is on the site; None: nowhere."""
    name, mark, anchor = target.partition("#")
    if not name:
        return target
    inside = os.path.normpath(os.path.join(os.path.dirname(source), name))
    if (ROOT / inside).is_dir():
        inside += "/report.html"
        if not (ROOT / inside).is_file():
            return None
    if inside in BESIDE:
        there = BESIDE[inside]
    elif inside.startswith("docs/"):
        there = inside.removeprefix("docs/")
    else:
        there = f"source/{inside}.txt"
    return os.path.relpath(there, os.path.dirname(uri) or ".") + mark + anchor


def source_of(uri: str) -> str:
    """Where in the repository the page lies."""
    return next((name for name, there in BESIDE.items() if there == uri), f"docs/{uri}")


def targets(page: File) -> set[str]:
    """Relative links of a page, without their anchors."""
    found = LINK.findall(page.content_string)
    return {(link or image).partition("#")[0] for _, link, _, image in found} - {""}
