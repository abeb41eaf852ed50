"""LongMem (2306.07174) token by token in float64 numpy, on a Llama with sinks and a window in every layer.

A bank is a plain list of raw keys and values in the order in which they left the window. What a chunk reads is the list
as it was when the chunk began.
"""

import math

import numpy as np

from tests.oracles.streaming_llm import Rule, mlp, norm, rope


def _value(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def _split(layer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw queries [K, G, D], key and value [K, D] of a token."""
    qkv = np.tensordot(norm(x, layer.mixer_norm), _value(layer.mixer.projections.qkv), axes=1)
    return qkv[:, :-2], qkv[:, -2], qkv[:, -1]


def _softmax(logits: list[float]) -> np.ndarray:
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum()


def _near(layer, q, entries: list, rule: Rule) -> np.ndarray:
    """Attention of a token's queries to what its layer holds, itself the newest."""
    config, places = layer.mixer.config, rule.places(entries)
    out = np.zeros_like(q)
    for head in range(q.shape[0]):
        for member in range(q.shape[1]):
            query = rope(q[head, member][None], places[-1], config.rope.theta, config.head_dim)[0]
            keys = [
                rope(e[0][head][None], at, config.rope.theta, config.head_dim)[0]
                for e, at in zip(entries, places, strict=True)
            ]
            weights = _softmax([query @ key / math.sqrt(config.head_dim) for key in keys])
            out[head, member] = sum(w * entry[1][head] for w, entry in zip(weights, entries, strict=True))
    return out


def _far(layer, q, bank: list, distance: int, page: int, capacity: int, top_k: int) -> np.ndarray:
    """Attention of a token's queries to the pages of the bank that each key head chooses."""
    config, total = layer.mixer.config, len(bank)
    held = range(max(total - capacity, 0), total)
    pages = sorted({i // page for i in held})
    out = np.zeros_like(q)
    for head in range(q.shape[0]):
        turned = rope(q[head], distance, config.rope.theta, config.head_dim)
        scores = []
        for number in pages:
            whole = range(number * page, min((number + 1) * page, total))  # those too that there was no more room for
            mean = np.mean([bank[i][0][head] for i in whole], axis=0)
            scores.append(max(query @ mean for query in turned))
        chosen = [pages[i] for i in np.argsort(-np.array(scores), kind="stable")[:top_k]]
        tokens = [i for i in held if i // page in chosen]
        for member, query in enumerate(turned):
            weights = _softmax([query @ bank[i][0][head] / math.sqrt(config.head_dim) for i in tokens])
            out[head, member] = sum(w * bank[i][1][head] for w, i in zip(weights, tokens, strict=True))
    return out


def _behind(layer, x: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """The layer's output from what its heads found."""
    x = x + np.tensordot(heads, _value(layer.mixer.projections.out), axes=3)
    return x + mlp(layer.mlp, layer.config.mlp, norm(x, layer.mlp_norm))


def logits(model, tokens: list[int], cuts: list[int], rule: Rule, **bank_options) -> np.ndarray:
    """What a model with a side network says behind each token of a stream; `cuts` are the sizes of its chunks."""
    side, count = model.side, model.config.num_layers
    reduction = side.config.reduction
    held: list[list] = [[] for _ in range(count + len(side.layers))]
    bank, said, at = [], [], 0
    for size in cuts:
        seen = list(bank)
        for token in tokens[at : at + size]:
            x = before = h = _value(model.embedding)[token]
            for i in range(count):
                layer = model.layer(i)
                q, k, v = _split(layer, x)
                held[i].append((k, v, None))
                x = _behind(layer, x, _near(layer, q, held[i], rule))
                if i == side.config.layer and len(held[i]) > rule.start + rule.recent:
                    bank.append(held[i][rule.start])
                held[i] = rule.keep(held[i])
                if (i + 1) % reduction:
                    continue
                own = i // reduction
                layer, cache = side.layers[own], held[count + own]
                q, k, v = _split(layer, h)
                cache.append((k, v, None))
                heads = _near(layer, q, cache, rule)
                if own == side.config.layer // reduction and seen:
                    gate = 1 / (1 + np.exp(-_value(side.gate)))
                    gate = gate.reshape(heads.shape[:2])[..., None]
                    heads = (1 - gate) * heads + gate * _far(layer, q, seen, **bank_options)
                held[count + own] = rule.keep(cache)
                h = h + _value(side.scale)[own] * (_behind(layer, h, heads) - h) + (x - before)
                before = x
            h = norm(h + (x - before), side.norm)
            said.append(h @ _value(model.embedding).T if model.head is None else h @ _value(model.head))
        at += size
    return np.stack(said)
