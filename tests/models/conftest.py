"""What compares with transformers is left out where that is not installed: under the suite's second Python."""

from importlib.util import find_spec

_WITH_PEERS = ["families", "files/test_gguf.py", "files/test_peft.py", "files/test_peft_kinds.py", "test_rope.py"]
collect_ignore = [] if find_spec("torch") else _WITH_PEERS
