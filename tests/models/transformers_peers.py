"""Tiny Hugging Face models with random weights: what the library's models are compared with."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

BATCH = 2
torch.set_num_threads(1)


def implementation(config: transformers.PreTrainedConfig) -> str:
    """Eager attention, but for Falcon with ALiBi: the eager one of transformers 5.23 adds the bias twice."""
    return "sdpa" if getattr(config, "alibi", False) else "eager"


def known(make: Callable[[], transformers.PreTrainedConfig]) -> transformers.PreTrainedConfig:
    """A configuration; the test is skipped where the transformers that is installed has no such family."""
    try:
        return make()
    except (AttributeError, ValueError) as error:
        lacks = re.search(
            r"module transformers\S* has no attribute (\w+)|Unrecognized model identifier: (\w+)", str(error)
        )
        if lacks is None:
            raise
        pytest.skip(f"transformers {transformers.__version__} has no {lacks[1] or lacks[2]}")


def peer(
    config: transformers.PreTrainedConfig | Callable[[], transformers.PreTrainedConfig], seed: int = 0
) -> torch.nn.Module:
    """A float32 model with every weight drawn at random, so that no norm is 1 and no bias 0; `config`: see `known`."""
    config = known(config) if callable(config) else config
    attention = implementation(config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
            if config.model_type in ("gemma4_text", "gemma4_unified_text") and name.endswith("q_norm.weight"):
                parameter.mul_(len(parameter) ** -0.5)  # its logits have no factor; without, all attention is sharp
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar", "expert_bias")):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def write(model: torch.nn.Module, folder: Path, **options) -> Path:
    """Save with safetensors."""
    model.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def tokens_for(model: torch.nn.Module, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens, int32 [BATCH, length]."""
    return np.random.RandomState(seed).randint(0, model.config.vocab_size, (BATCH, length)).astype(np.int32)


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """The peer's logits, float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def reload(folder: Path) -> torch.nn.Module:
    """What transformers makes of a folder."""
    attention = implementation(transformers.AutoConfig.from_pretrained(folder))
    options = {"attn_implementation": attention, "dtype": torch.float32}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


def edit_json(file: Path, remove: tuple[str, ...] = (), **changes) -> dict:
    """Change fields of a JSON file; its new contents."""
    values = {**json.loads(file.read_text()), **changes}
    values = {name: value for name, value in values.items() if name not in remove}
    file.write_text(json.dumps(values))
    return values
