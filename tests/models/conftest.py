"""What compares with transformers is left out where that is not installed: under the suite's second Python."""

from importlib.util import find_spec

_FILES = ("test_gguf", "test_peft", "test_peft_kinds", "test_quantised_weights")
_WITH_PEERS = ["families", *(f"files/{name}.py" for name in _FILES), "test_rope.py"]
collect_ignore = [] if find_spec("torch") else _WITH_PEERS
