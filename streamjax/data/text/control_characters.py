"""Text of models and strangers, fit for a terminal: a control character would be obeyed, not shown."""

from __future__ import annotations

import re

# C0 but for tab and line feed, DEL, C1; separators of lines, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    """The text with its control characters written as escapes, such as \\x1b; tabs and line feeds stay.

    Example:
      >>> escape_controls("plain, \\x1b[31mred")
      'plain, \\\\x1b[31mred'
    """
    return _CONTROL.sub(lambda found: _escape(ord(found[0])), text)


def quoted(text: str) -> str:
    """A text as a quotation: each line behind a bar, control characters written as escapes."""
    return "\n".join("    | " + escape_controls(line) for line in text.splitlines())


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
