"""Bring each fault back in a copy of the repository, and see that its tests fail.

    python -m tests.faults                # all of them, about a minute each
    python -m tests.faults surrogate NaN  # those whose name has one of these words

A test that passes, or that fails for another reason than the fault (a name that is not there any more), is told, and
the exit status is then 1.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.faults.bringing_back import bring_back, copied
from tests.faults.reverted import FAULTS

if __name__ == "__main__":
    words = sys.argv[1:]
    wanted = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not wanted:
        raise SystemExit(f"error: no fault is named so; there are:\n{chr(10).join(fault.name for fault in FAULTS)}")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder) / "copy")
        for fault in wanted:
            outcome = bring_back(fault, root)
            missed += not outcome.noticed
            print(f"{'noticed' if outcome.noticed else 'MISSED '}  {fault.name}: {outcome.said}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} faults are noticed")
    raise SystemExit(bool(missed))
