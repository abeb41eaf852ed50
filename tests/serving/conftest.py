"""The HTTP layer is tested where its extra is installed."""

from importlib.util import find_spec

collect_ignore = [] if all(map(find_spec, ("starlette", "llguidance", "openai"))) else ["http"]
