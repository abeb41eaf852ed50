"""Processes that tests start."""

import os


def one_device_flags() -> str:
    """XLA_FLAGS for one device, as on a small machine, whose programs are compiled as quickly as the suite's own."""
    return os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
