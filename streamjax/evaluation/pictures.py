"""Pictures on disk: the formats that there are, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from streamjax.checkpoints import write_bytes

if TYPE_CHECKING:  # it takes its time
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg", "jpg", "jpeg", "webp")


def picture_format(path: str | Path) -> str:
    """The format of a picture by its name's ending; png where there is none.

    Raises:
      ValueError: an ending that stands for no format.

    Example:
      >>> picture_format("out/curve.svg")
      'svg'
    """
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in FORMATS:
        raise ValueError(f"{path}: no format of pictures is called {ending!r}; end the name in .{', .'.join(FORMATS)}")
    return ending


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write a figure under just this name; its folder is made.

    Raises:
      ValueError: as in `picture_format`.
      OSError: it cannot be written; a file that was there is as it was.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=picture_format(path), dpi=120)
    write_bytes(Path(path), drawn.getvalue())
