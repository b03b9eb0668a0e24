"""What the site takes from outside of docs/: README.md as its first page, CHANGELOG.md, CONTRIBUTING.md and results/.

The pages link to each other as files of the repository do, so that they can be read there. Here their links are turned
into links of the site; files that are no pages, as code is, become plain text.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/**/*.md"))
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", *RESULTS]


def on_startup(**_: Any) -> None:
    """Copy the code: what collects its docstrings follows no links, as src/skipless has, and wants an __init__.py."""
    copy = ROOT / "build" / "reference" / "skipless"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "skipless", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in copy.rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn the links of a file of the repository into links of the site."""
    uri = page.file.src_uri
    own = Path(page.file.abs_src_path).relative_to(ROOT).parent

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = (ROOT / own / target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        name = "index.md" if name == "README.md" else name.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return text.removeprefix("[").removesuffix("]")
        return f"{text}({'../' * uri.count('/')}{name}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", turned, markdown)
