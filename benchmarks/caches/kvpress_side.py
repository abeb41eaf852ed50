"""kvpress's half of `versus_kvpress.py`: runs in its own environment, with torch, and imports nothing of streamjax.

    python benchmarks/caches/kvpress_side.py scores|choices|times|wall REQUEST.json ANSWER.json

Each context is read once; in every layer each press compresses the same keys and values by its own `compress`, as its
hook would have done, and `KVPressTextGenerationPipeline.generate_answer` decodes from each result. What is done stands
in ANSWER.json after every example, and is not done again.
"""

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVPressTextGenerationPipeline,
    LagKVPress,
    LeverageScorePress,
    ObservedAttentionPress,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

PRESSES = {
    "streaming_llm": lambda: StreamingLLMPress(n_sink=4),
    "snapkv": lambda: SnapKVPress(window_size=32, kernel_size=5),
    "h2o": lambda: ObservedAttentionPress(),
    "tova": lambda: TOVAPress(),
    "knorm": lambda: KnormPress(),
    "keydiff": lambda: KeyDiffPress(),
    "lagkv": lambda: LagKVPress(n_sink=4, lag_size=128),
    "expected_attention": lambda: ExpectedAttentionPress(n_future_positions=512, n_sink=4),
    "chunkkv": lambda: ChunkKVPress(SnapKVPress(window_size=30, kernel_size=1), chunk_length=10),
    "curdkv": lambda: CURPress(num_sinks=4, local_window_size=16),
    "leverage": lambda: LeverageScorePress(sketch_dimension=48),
    "pyramidkv": lambda: PyramidKVPress(window_size=32, kernel_size=5),
    "adakv": lambda: AdaKVPress(SnapKVPress(window_size=32, kernel_size=5)),
    "criticalkv": lambda: CriticalKVPress(SnapKVPress(window_size=32, kernel_size=5)),
    "random": lambda: RandomPress(seed=1),
}


def made(name, ratio):
    press = PRESSES[name]()
    press.compression_ratio = 1 - ratio
    return press


def attention_layers(model):
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        yield layer.self_attn


def compressed(model, ids, presses):
    """The caches of all presses after one reading of the context, each as (keys, values, masked keys) by layer."""
    found = {key: [] for key in presses}

    def hook(module, arguments, kwargs, output):
        cache = kwargs["past_key_values"].layers[module.layer_idx]
        for key, press in presses.items():
            module.masked_key_indices = None
            attentions = output[1] if isinstance(press, ObservedAttentionPress) else None
            # the presses that mask keys refuse eager attention; nothing is computed by it here
            implementation, module.config._attn_implementation = module.config._attn_implementation, "sdpa"
            keys, values = press.compress(module, kwargs["hidden_states"], cache.keys, cache.values, attentions, kwargs)
            module.config._attn_implementation = implementation
            found[key].append((keys, values, module.masked_key_indices))
        module.masked_key_indices = None
        return output

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in attention_layers(model)]
    cache = DynamicCache()
    model.model(input_ids=ids, past_key_values=cache)
    for each in hooks:
        each.remove()
    found["dense"] = [(layer.keys, layer.values, None) for layer in cache.layers]
    return found


def decode(pipeline, model, kept, length, prompt, tokens):
    cache = DynamicCache()
    for index, (layer, (keys, values, masked)) in enumerate(zip(attention_layers(model), kept, strict=True)):
        cache.update(keys.clone(), values.clone(), index)
        layer.masked_key_indices = copy.deepcopy(masked)
    text = pipeline.generate_answer(prompt, cache, length, tokens)
    for layer in attention_layers(model):
        layer.masked_key_indices = None
    return text


def scores(request, answer):
    model, pipeline = load(request, "eager")
    done = json.loads(answer.read_text()) if answer.exists() else {}
    for number, example in enumerate(request["examples"]):
        wanted = {f"{name} {ratio}" for name in request["methods"] for ratio in request["ratios"]} | {"dense"}
        missing = sorted(wanted - set(done.get(str(number), {})))
        if not missing:
            continue
        presses = {key: made(*split(key)) for key in missing if key != "dense"}
        for press in presses.values():
            press.post_init_from_model(model)
        ids = torch.tensor([example["context"]])
        prompt = torch.tensor([example["prompt"]])
        kept = compressed(model, ids, presses)
        model.set_attn_implementation("sdpa")
        for key in missing:
            try:
                text = decode(pipeline, model, kept[key], ids.shape[1], prompt, example["answer_tokens"])
            except RuntimeError as error:  # PyramidKV's layers differ in length, and sdpa's mask has the first one's
                print(f"{key}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                text = None
            done.setdefault(str(number), {})[key] = text
        model.set_attn_implementation("eager")
        answer.write_text(json.dumps(done))
        print(number, file=sys.stderr, flush=True)


def choices(request, answer):
    """Which places of the first context stay, by layer and head, at the first share; a key is found where it was."""
    found = json.loads(answer.read_text()) if answer.exists() else {}
    presses = {name: made(name, request["ratios"][0]) for name in request["methods"] if name not in found}
    if not presses:
        return
    model, _ = load(request, "eager")
    ids = torch.tensor([request["examples"][0]["context"]])
    for press in presses.values():
        press.post_init_from_model(model)
    kept = compressed(model, ids, presses)
    whole = kept.pop("dense")
    found |= {
        name: [[places(keys[0, head], before[0, head]) for head in range(keys.shape[1])]
               for (keys, _, _), (before, _, _) in zip(layers, whole, strict=True)]
        for name, layers in kept.items()
    }  # fmt: skip
    answer.write_text(json.dumps(found))


def places(keys, before):
    return torch.cdist(keys.double(), before.double()).argmin(dim=1).sort().values.tolist()


def wall(request, answer):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    times(request, answer, time.perf_counter)


def times(request, answer, clock=time.process_time):
    """Seconds of the pipeline itself, a first run apart: reading and compaction, and decoding."""
    done = json.loads(answer.read_text()) if answer.exists() else {}
    example = request["examples"][0]
    inputs = {"context_ids": torch.tensor([example["context"]]), "questions_ids": [torch.tensor([example["prompt"]])]}
    for name in request["methods"]:
        if name in done:
            continue
        model, pipeline = load(request, "eager" if name == "h2o" else "sdpa")
        model.generation_config.eos_token_id = -1  # every run decodes the same number of tokens
        spent = []
        for _ in range(request["repeats"] + 1):
            began = clock()
            press = made(name, request["ratios"][0])
            pipeline._forward(dict(inputs), max_new_tokens=request["timed_tokens"], press=press)
            spent.append(clock() - began)
        done[name] = statistics.median(spent[1:])
        answer.write_text(json.dumps(done))


def split(key):
    name, ratio = key.rsplit(" ", 1)
    return name, float(ratio)


def load(request, attention):
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation=attention
    ).eval()
    return model, KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # more would count their waiting for each other as CPU seconds
    what, request_path, answer_path = sys.argv[1:]
    {"scores": scores, "choices": choices, "times": times, "wall": wall}[what](
        json.loads(Path(request_path).read_text()), Path(answer_path)
    )
