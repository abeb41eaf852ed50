"""The table of what a run compiles."""

from tests.compiled_programs import table


def test_programs_are_told_by_size_and_those_that_come_again():
    lines = table([(0.01, "a"), (0.02, "b"), (0.5, "c"), (0.01, "a"), (0.3, "c"), (0.2, "d")])
    counts = [(int(words[3]), float(words[5]), int(words[8]), float(words[12])) for words in map(str.split, lines)]
    assert counts == [(2, 0.0, 1, 0.0), (1, 0.0, 0, 0.0), (0, 0.0, 0, 0.0), (3, 1.0, 1, 0.3)]
