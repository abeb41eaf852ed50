"""What a panic of the `tokenizers` library's Rust code writes to the process's stderr, kept away from users.

Rust writes where it panicked, and with RUST_BACKTRACE a hundred frames, before Python hears of it. Python's
`sys.stderr` has no part in that: the file descriptor itself has to lead elsewhere meanwhile.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

_STDERR = 2
_REPORT = b"thread '"  # with which Rust's lines begin
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def without_panic_reports() -> Iterator[None]:
    """Run the body; if it panics, what Rust says of that is dropped. All else that is written comes out behind it.

    For what is done once, such as reading a file: while it runs no thread writes to the terminal.
    """
    with _one_at_a_time, contextlib.ExitStack() as stack:
        try:
            terminal = os.dup(_STDERR)
        except OSError:  # closed: nobody reads what is said
            yield
            return
        stack.callback(os.close, terminal)
        held = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(held.fileno(), _STDERR)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"
            raise
        finally:
            os.dup2(terminal, _STDERR)
            held.seek(0)
            written = held.read()
            written = written.partition(_REPORT)[0].rstrip(b"\n") if panicked else written
            if written:
                with contextlib.suppress(OSError), os.fdopen(os.dup(_STDERR), "wb") as stderr:
                    stderr.write(written)
