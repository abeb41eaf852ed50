"""Arrays on disk: pytrees and the checkpoints of training runs, by Orbax, in folders that are whole and checked.

Knows no model, no stream and no run.
"""

from streamjax.checkpoints.json_files import parse_json, read_json, require_file
from streamjax.checkpoints.manifests import DamagedFile, check_manifest
from streamjax.checkpoints.pytrees import check_place, read_about, restore_pytree, save_pytree
from streamjax.checkpoints.replacing import SaveError, replaced_folder, whole
from streamjax.checkpoints.runs import RunCheckpoints
from streamjax.checkpoints.text_files import replace_text, write_bytes
from streamjax.checkpoints.user_paths import user_path

__all__ = [
    "DamagedFile",
    "RunCheckpoints",
    "SaveError",
    "check_manifest",
    "check_place",
    "parse_json",
    "read_about",
    "read_json",
    "replace_text",
    "replaced_folder",
    "require_file",
    "restore_pytree",
    "save_pytree",
    "user_path",
    "whole",
    "write_bytes",
]
