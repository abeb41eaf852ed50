"""Models in files: Hugging Face folders, safetensors, and streamjax's own layout."""
