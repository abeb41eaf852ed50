"""The run-time type checker of the suite: beartype, with ints welcome where floats are annotated."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
