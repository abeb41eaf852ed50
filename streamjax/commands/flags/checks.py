"""What flags of several commands must hold."""

from __future__ import annotations

from absl import flags


def refuse_empty(values: flags.FlagValues, *names: str) -> None:
    """Refuse an empty value, as a variable of the shell that is not set leaves it: it names nothing.

    Args:
      values: which has the flags.
      *names: of flags that hold a path.
    """
    for name in names:
        flags.register_validator(
            name, lambda value: value != "", message="it is empty: name a path, or leave the flag away",
            flag_values=values,
        )  # fmt: skip
