"""Pages can be read in an editor: their lines end where CONTRIBUTING.md says."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, prose

LIMIT = int(re.search(r"and (\d+) in Markdown", (ROOT / "CONTRIBUTING.md").read_text())[1])


def too_long(text: str) -> list[str]:
    """The lines of a page's prose beyond the limit; rows of tables and lines of HTML cannot be cut."""
    return [line for line in text.splitlines() if len(line) > LIMIT and not line.lstrip().startswith(("|", "<"))]


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_markdown_are_short(page):
    assert not too_long(prose(page))


@pytest.mark.quick
def test_long_lines_are_found():
    assert too_long(f"short\n{'x' * (LIMIT + 1)}\n| {'x' * LIMIT} |\n{'x' * LIMIT}\n") == ["x" * (LIMIT + 1)]
