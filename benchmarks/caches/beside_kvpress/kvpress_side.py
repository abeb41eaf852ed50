"""kvpress's half of `versus_kvpress.py`: runs in its own environment, with torch, and imports nothing of streamjax.

    python benchmarks/caches/beside_kvpress/kvpress_side.py scores|choices|times|wall REQUEST.json ANSWER.json

Each context is read once; in every layer each press compresses the same keys and values by its own `compress`, as its
hook would have done, and `KVPressTextGenerationPipeline.generate_answer` decodes from each result. Presses that read
more than the context (kvzip, finch) read for themselves, under their own hooks. What is done stands in ANSWER.json
after every example, and is not done again.
"""

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from kvpress import KVPressTextGenerationPipeline, ObservedAttentionPress
from presses import DELIMITER, made
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

READ_MORE = ("kvzip", "finch")


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
            own = cache.keys.clone(), cache.values.clone()  # think writes into its keys
            keys, values = press.compress(module, kwargs["hidden_states"], *own, attentions, kwargs)
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


def read_by_press(model, press, ids):
    """What a press leaves that reads for itself, under its own hooks."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    masked = [getattr(layer, "masked_key_indices", None) for layer in attention_layers(model)]
    return [(layer.keys, layer.values, mask) for layer, mask in zip(cache.layers, masked, strict=True)]


def inputs_of(name, press, context, prompt):
    """What is read before compression, what behind it, and where that stands: finch reads the question with the rest"""
    if name != "finch":
        return context, prompt, len(context)
    kept = press.rerotate_keys
    length = len(context) + len(prompt) - 1
    if kept:
        length = int(length * (1 - press.compression_ratio))
    return [*context, DELIMITER, *prompt[:-1]], prompt[-1:], length


def decode(pipeline, model, kept, length, prompt, tokens):
    cache = DynamicCache()
    for index, (layer, (keys, values, masked)) in enumerate(zip(attention_layers(model), kept, strict=True)):
        cache.update(keys.clone(), values.clone(), index)
        layer.masked_key_indices = copy.deepcopy(masked)
    if len({keys.shape[2] for keys, _, _ in kept}) > 1:
        # transformers makes one mask, of the first layer's length; single tokens need none
        for place in range(prompt.shape[1] - 1):
            position = torch.tensor([[length + place]])
            model(input_ids=prompt[:, place : place + 1], past_key_values=cache, position_ids=position)
        length, prompt = length + prompt.shape[1] - 1, prompt[:, -1:]
    text = pipeline.generate_answer(prompt, cache, length, tokens)
    for layer in attention_layers(model):
        layer.masked_key_indices = None
    return text


def scores(request, answer):
    model, pipeline = load(request, "eager")
    done = json.loads(answer.read_text()) if answer.exists() else {}
    for number, example in enumerate(request["examples"]):
        wanted = {f"{name} {ratio}" for name in request["methods"] for ratio in request["ratios"]} | {"dense"}
        missing = sorted(key for key in wanted if done.get(str(number), {}).get(key) is None)
        if not missing:
            continue
        context, prompt = example["context"], example["prompt"]
        presses = {key: made(request, *split(key), len(context), len(prompt)) for key in missing if key != "dense"}
        for press in presses.values():
            press.post_init_from_model(model)
        at_once = {key: press for key, press in presses.items() if split(key)[0] not in READ_MORE}
        # eager attention keeps what it computed, which only h2o reads
        model.set_attn_implementation("eager" if any(key.startswith("h2o") for key in missing) else "sdpa")
        kept = compressed(model, torch.tensor([context]), at_once)
        model.set_attn_implementation("sdpa")
        for key in missing:
            read, rest, length = inputs_of(split(key)[0] if key in presses else key, presses.get(key), context, prompt)
            if key not in kept:
                kept[key] = read_by_press(model, presses[key], torch.tensor([read]))
            text = decode(pipeline, model, kept.pop(key), length, torch.tensor([rest]), example["answer_tokens"])
            done.setdefault(str(number), {})[key] = text
        answer.write_text(json.dumps(done))
        print(number, file=sys.stderr, flush=True)


def choices(request, answer):
    """Which places of the first context stay, by layer and head, at each share; a key is found where it was."""
    found = json.loads(answer.read_text()) if answer.exists() else {}
    model, _ = load(request, "eager")
    example = request["examples"][0]
    context, prompt = example["context"], example["prompt"]
    for name in request["methods"]:
        for share in request["ratios"]:
            key = f"{name} {share}"
            if key in found or name == "think":  # which keeps every token
                continue
            press = made(request, name, share, len(context), len(prompt))
            press.post_init_from_model(model)
            if name == "finch":
                press.rerotate_keys = False
            model.set_attn_implementation("eager" if name == "h2o" else "sdpa")
            kept = compressed(model, torch.tensor([context]), {} if name in READ_MORE else {key: press})
            whole = kept.pop("dense")
            if name in READ_MORE:
                read = inputs_of(name, press, context, prompt)[0]
                kept[key] = read_by_press(model, press, torch.tensor([read]))
            found[key] = [of_layer(one, before) for one, (before, _, _) in zip(kept[key], whole, strict=True)]
            answer.write_text(json.dumps(found))


def of_layer(kept, before):
    keys, _, masked = kept
    found = []
    for head in range(keys.shape[1]):
        if masked is None:
            far, place = torch.cdist(keys[0, head].double(), before[0, head].double()).min(dim=1)
            found.append(
                place[far < 1e-2].sort().values.tolist()
            )  # a question's keys are far from all of the context's
        else:
            gone = set(masked[2][masked[1] == head].tolist())
            found.append([place for place in range(keys.shape[2]) if place not in gone])
    return found


def wall(request, answer):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    times(request, answer, time.perf_counter)


def times(request, answer, clock=time.process_time):
    """Seconds of the pipeline itself, a first run apart: reading and compaction, and decoding."""
    done = json.loads(answer.read_text()) if answer.exists() else {}
    example = request["examples"][0]
    context, prompt = example["context"], example["prompt"]
    for name in request["methods"]:
        if name in done:
            continue
        model, pipeline = load(request, "eager" if name == "h2o" else "sdpa")
        model.generation_config.eos_token_id = -1  # every run decodes the same number of tokens
        spent = []
        for _ in range(request["repeats"] + 1):
            began = clock()
            press = made(request, name, request["ratios"][0], len(context), len(prompt))
            read, rest, _ = inputs_of(name, press, context, prompt)
            inputs = {"context_ids": torch.tensor([read]), "questions_ids": [torch.tensor([rest])]}
            pipeline._forward(inputs, max_new_tokens=request["timed_tokens"], press=press)
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
