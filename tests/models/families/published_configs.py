"""Excerpts of config.json files that models were published with: what decides their computation.

They are in the form that files had before transformers 5: a file of `published/` a model, named after it. Of
`gemma-3-4b`, a multimodal one, there is the text's part; what it does not say is the architecture's default.
"""

import json
from pathlib import Path

FILES = sorted((Path(__file__).parent / "published").glob("*.json"))
ALL = {file.stem: json.loads(file.read_text()) for file in FILES}
GEMMA_3_4B = ALL["gemma-3-4b"]
PUBLISHED = {name: values for name, values in ALL.items() if values is not GEMMA_3_4B}
