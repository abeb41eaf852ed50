"""Arrays on disk by Orbax: pytrees and the checkpoints of training runs.

It knows no model, no stream and no run.
"""

from streamjax.checkpoints.pytrees import read_about, restore_pytree, save_pytree
from streamjax.checkpoints.runs import RunCheckpoints

__all__ = ["RunCheckpoints", "read_about", "restore_pytree", "save_pytree"]
