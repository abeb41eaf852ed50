"""Eight virtual CPU devices for the whole suite, and run-time checks of the shapes that annotations state."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook(["streamjax", "pallas_kernels"], "typecheck.checked")

from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("suite")
