"""What Rust says of its panics is not shown, and all else that is written meanwhile is."""

import contextlib
import os

import pytest

from streamjax.data.text.rust_panics import without_panic_reports

REPORT = b"\nthread '<unnamed>' (12) panicked at src/lib.rs:6:\nout of bounds\nnote: run with RUST_BACKTRACE=1\n"


class PanicException(BaseException):
    """As Rust's panics come."""


@pytest.mark.parametrize(
    ("written", "error", "shown"),
    [
        (b"a warning\n", None, "a warning\n"),
        (b"a warning" + REPORT, PanicException, "a warning"),
        (REPORT, PanicException, ""),
        (b"no panic" + REPORT, KeyboardInterrupt, "no panic" + REPORT.decode()),
    ],
)
def test_only_reports_of_panics_are_dropped(capfd: pytest.CaptureFixture[str], written, error, shown):
    @without_panic_reports()
    def work():
        os.write(2, written)
        if error:
            raise error

    with pytest.raises(error) if error else contextlib.nullcontext():
        work()
    os.write(2, b"|behind")
    assert capfd.readouterr().err == shown + "|behind"


def test_a_closed_stderr_stays_closed(monkeypatch):
    def closed(_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    with without_panic_reports():
        assert True
