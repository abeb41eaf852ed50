"""Benchmarks of long contexts: RULER's tasks and their neighbours, for any tokenizer and any length.

    from streamjax.data.ruler import make_example, score

    example = make_example("niah_single_1", 4096, tokenizer, seed=0)
    score(example.turns[0], " 1234567")

Every task is drawn from a seed and filled up to a length in tokens. An example comes in parts, so that a cache can be
compacted between the context and the question. `tasks.py` has their names.
"""

from streamjax.data.ruler.example import Example, Turn, encode_example, score
from streamjax.data.ruler.tasks import GROUPS, TASKS, make_example, task_names

__all__ = ["GROUPS", "TASKS", "Example", "Turn", "encode_example", "make_example", "score", "task_names"]
