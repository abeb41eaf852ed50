"""The address of the repository, which pyproject.toml states and other files repeat.

    python -m docs.address                                   # prints it
    python -m docs.address https://github.com/OWNER/NAME     # sets it everywhere: do so once, before publishing

Notebooks that lie in no clone clone it, README's badge opens one in Colab from it, and CITATION.cff cites it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORM = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?<!\.git)")
# Files, and the words that name the address there: {} is all of it, {name} its OWNER/NAME.
REPEATED = [
    ("pyproject.toml", 'Repository = "{}"'),
    ("CITATION.cff", 'repository-code: "{}"'),
    ("README.md", "[in Colab]: https://colab.research.google.com/github/{name}/blob/main/colab/quickstart.ipynb\n"),
    ("README.md", "pip install git+{}\n"),
    ("colab/*.ipynb", 'os.environ.get(\\"STREAMJAX_SOURCE\\", \\"{}\\")'),
]


def stated(root: Path = ROOT) -> str:
    """What `project.urls` of pyproject.toml has."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def phrases(address: str) -> list[tuple[str, str]]:
    """`REPEATED` with the address in it."""
    fits = FORM.fullmatch(address)
    if fits is None:
        raise ValueError(f"{address!r} is no address like https://github.com/OWNER/NAME")
    return [(files, words.format(address, name=fits[1])) for files, words in REPEATED]


def set_everywhere(address: str, root: Path = ROOT) -> list[Path]:
    """Write it into all files that name the one stated before; returns those that changed."""
    texts: dict[Path, str] = {}
    for (files, before), (_, after) in zip(phrases(stated(root)), phrases(address), strict=True):
        for path in sorted(root.glob(files)):
            text = texts.get(path) or path.read_text(encoding="utf-8")
            if before not in text:
                raise ValueError(f"{path.relative_to(root)} lacks {before.strip()}")
            texts[path] = text.replace(before, after)
    changed = [path for path, text in texts.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        path.write_text(texts[path], encoding="utf-8")
    return changed


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(stated())
    else:
        try:
            print(*(path.relative_to(ROOT) for path in set_everywhere(sys.argv[1])), sep="\n")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
