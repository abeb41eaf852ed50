"""Arrays on disk: pytrees and the checkpoints of training runs, by Orbax. Knows no model, no stream and no run."""

from streamjax.checkpoints.pytrees import read_about, restore_pytree, save_pytree
from streamjax.checkpoints.runs import RunCheckpoints

__all__ = ["RunCheckpoints", "read_about", "restore_pytree", "save_pytree"]
