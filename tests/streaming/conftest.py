"""Fixtures of the streaming tests."""

import jaxtyping
import pytest


@pytest.fixture
def untyped():
    """Without the suite's run-time type checks: arguments of a wrong type reach the library, as a user's do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
