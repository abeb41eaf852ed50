"""What compares with transformers is left out where that is not installed: under the suite's second Python."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["test_configs.py", "test_families.py", "test_rope.py"]
