"""Pages of the site that are made from what lies elsewhere: README and its neighbours, and the commands' help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}


def _for_the_site(text: str) -> str:
    """Turns links from the repository's root into links from docs/."""
    for page, source in PAGES.items():
        text = text.replace(f"]({source})", f"]({page})")
    text = text.replace("](docs/results)", "](results/index.md)")
    return re.sub(r"\]\(docs/", "](", text)


def _commands() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from upg_jax.cli._app import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="upg-jax", title="Commands")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    for page, source in PAGES.items():
        text = _for_the_site((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    return files
