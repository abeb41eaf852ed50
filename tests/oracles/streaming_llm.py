"""StreamingLLM token by token in float64 numpy, as published (Xiao et al., 2309.17453, section 3.2 and appendix).

A layer caches keys before rotation. A token reads the cache with its keys rotated to their places in the cache, 0, 1,
..., n - 1, and its own query and key at place n; ALiBi slopes multiply the same places. After the token the cache is
cut to the first `start` and the last `recent` entries. A plain window is `start = 0`; a dense cache is never cut.

Nothing here comes from the library but the weights: the decoder is written out again, one token at a time.
"""

import dataclasses
import math

import numpy as np

from tests.oracles.recurrent_mixers import HANDING, MIXERS

_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What stays in the cache after each token: the first `start` and the last `recent` (None: everything).

    `shift` is the published positions within the cache; without it a key stays at its place in the stream.
    """

    start: int = 0
    recent: int | None = None
    shift: bool = True

    def places(self, cache: list) -> list[int]:
        """Where each entry stands, the newest being the token itself."""
        return list(range(len(cache))) if self.shift else [entry[2] for entry in cache]

    def keep(self, entries: list) -> list:
        if self.recent is None or len(entries) <= self.start + self.recent:
            return entries
        return entries[: self.start] + entries[len(entries) - self.recent :]


@dataclasses.dataclass(frozen=True)
class Chunks(Rule):
    """Attention within chunks: with its last token a chunk is forgotten."""

    size: int = 0

    def keep(self, entries: list) -> list:
        return [] if len(entries) == self.size else entries


DENSE = Rule()


def _value(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def norm(x: np.ndarray, module) -> np.ndarray:
    """RMSNorm or LayerNorm over the last axis."""
    if not module.rms:
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + module.eps)
    if module.weight is not None:
        y = y * (_value(module.weight) + module.offset)
    return y if module.bias is None else y + _value(module.bias)


def rope(x: np.ndarray, place: int, theta: float, rotary_dim: int, turning: int | None = None) -> np.ndarray:
    """Rotate the first `rotary_dim` channels of every head [heads, D] to `place`, or `turning` of them, in pairs."""
    half = rotary_dim // 2
    out = x.copy()
    for d in range((turning or rotary_dim) // 2):
        angle = place * theta ** (-2 * d / rotary_dim)
        a, b = x[:, d], x[:, d + half]
        out[:, d] = a * math.cos(angle) - b * math.sin(angle)
        out[:, d + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(layer, x: np.ndarray, cache: list, rule: Rule) -> np.ndarray:
    """One token's attention; appends its own raw key, value and index in the stream to the cache."""
    p, config = layer.mixer.projections, layer.mixer.config
    qkv = np.tensordot(x, _value(p.qkv), axes=1)  # [K, G + 2, D]
    if p.qkv_bias is not None:
        qkv = qkv + _value(p.qkv_bias)
    if config.clip_qkv is not None:
        qkv = np.clip(qkv, -config.clip_qkv, config.clip_qkv)
    group = config.num_heads // config.num_kv_heads
    q, gate, key = qkv[:, :group], None, group
    if config.output_gate:
        q, gate, key = qkv[:, 0 : 2 * group : 2], qkv[:, 1 : 2 * group : 2], 2 * group
    q = q.reshape(config.num_heads, -1)
    if config.keys_of is not None:  # `cache` is another layer's, which has the token already
        return _attended(layer, norm(q, p.q_norm) if p.q_norm is not None else q, gate, cache, rule)
    k, v = qkv[:, key], qkv[:, -1]
    if p.v_norm is not None:
        v = norm(v, p.v_norm)
    if p.q_norm is not None:
        whole = config.qk_norm_over == "projection"
        q, k = (
            norm(x.reshape(-1), module).reshape(x.shape) if whole else norm(x, module)
            for x, module in ((q, p.q_norm), (k, p.k_norm))
        )
    cache.append((k, v, cache[-1][2] + 1 if cache else 0))
    return _attended(layer, q, gate, cache, rule)


def _attended(layer, q: np.ndarray, gate: np.ndarray | None, cache: list, rule: Rule) -> np.ndarray:
    """What a token's queries make of a cache that has its own key."""
    p, config = layer.mixer.projections, layer.mixer.config
    group, places = config.num_heads // config.num_kv_heads, rule.places(cache)

    def turn(heads: np.ndarray, at: int) -> np.ndarray:
        if config.rope is None:
            return heads
        width, turning = config.head_dim, config.rope.rotary_dim or config.head_dim
        if config.rope.kind == "proportional":
            return rope(heads, at, config.rope.theta, width, turning)
        assert config.rope.kind == "default", "the oracle knows these two kinds of RoPE only"
        return rope(heads, at, config.rope.theta, turning)

    query = turn(q, places[-1])
    if config.temperature is not None:
        rule = config.temperature
        query = query * (1 + rule.beta * math.log(1 + (places[-1] + rule.start) // rule.length))
    keys = np.stack([turn(entry[0], at) for at, entry in zip(places, cache, strict=True)])  # [n, K, D]
    values = np.stack([entry[1] for entry in cache])
    out = np.zeros((config.num_heads, config.head_dim))
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    for head in range(config.num_heads):
        logits = keys[:, head // group] @ query[head] * scale
        if config.softcap is not None:
            logits = config.softcap * np.tanh(logits / config.softcap)
        if config.alibi_slopes:
            logits = logits - config.alibi_slopes[head] * (places[-1] - np.array(places))
        sink = -np.inf if layer.mixer.sink_logits is None else _value(layer.mixer.sink_logits)[head]
        top = max(logits.max(), sink)
        weights = np.exp(logits - top)
        out[head] = weights @ values[:, head // group] / (weights.sum() + np.exp(sink - top))
    out = out.reshape(config.num_kv_heads, group, -1)
    out = out if gate is None else out / (1 + np.exp(-gate))
    y = np.tensordot(out, _value(p.out), axes=3)
    return config.out_scale * (y if p.out_bias is None else y + _value(p.out_bias))


def latent_attention(layer, x: np.ndarray, cache: list, rule: Rule) -> np.ndarray:
    """One token's latent attention, each head with keys and values of its own; the cache has the raw rotary channels
    of a key, pairs apart, and the latent."""
    p, config = layer.mixer, layer.mixer.config
    nope, turning = config.nope_dim, config.rope_dim

    def apart(channels: np.ndarray) -> np.ndarray:
        if not config.interleaved:
            return channels
        return np.concatenate((channels[..., 0::2], channels[..., 1::2]), axis=-1)

    q = x if p.q_down is None else norm(x @ _value(p.q_down), p.q_norm)
    q = np.tensordot(q, _value(p.q_up), axes=1)  # [H, N + R]
    cache.append(
        (apart(x @ _value(p.k_rope)), norm(x @ _value(p.kv_down), p.kv_norm), cache[-1][2] + 1 if cache else 0)
    )
    places = rule.places(cache)
    assert config.rope is None or config.rope.kind == "default", "the oracle knows plain RoPE only"

    def turned(channels: np.ndarray, at: int) -> np.ndarray:
        return channels if config.rope is None else rope(channels, at, config.rope.theta, turning)

    query = turned(apart(q[:, nope:]), places[-1])
    heads = np.stack([np.tensordot(entry[1], _value(p.kv_up), axes=1) for entry in cache])  # [n, H, N + V]
    shared = np.stack([turned(entry[0][None], at)[0] for at, entry in zip(places, cache, strict=True)])
    scale = (nope + turning) ** -0.5 if config.scale is None else config.scale
    out = np.zeros((config.num_heads, config.value_dim))
    for head in range(config.num_heads):
        logits = (heads[:, head, :nope] @ q[head, :nope] + shared @ query[head]) * scale
        weights = np.exp(logits - logits.max())
        out[head] = weights @ heads[:, head, nope:] / weights.sum()
    return np.tensordot(out, _value(p.out), axes=2)


def experts(module, config, x: np.ndarray, routed: np.ndarray | None = None) -> np.ndarray:
    """The chosen experts one after the other, and the shared one; the router may read something else."""
    scores = (x if routed is None else routed) @ _value(module.router)
    if config.router_bias:
        scores = scores + _value(module.router_bias)
    if config.scores == "sigmoid":
        scores = 1 / (1 + np.exp(-scores))
    else:
        scores = np.exp(scores - scores.max())
        scores = scores / scores.sum()
    ranked = scores + (_value(module.selection_bias) if config.selection_bias else 0.0)
    size, take = config.num_experts // config.groups, 2 if config.group_rank == "two best" else 1
    of_group = [np.sort(ranked[i * size : (i + 1) * size])[-take:].sum() for i in range(config.groups)]
    open_ = np.argsort(-np.array(of_group), kind="stable")[: config.groups_per_token]
    ranked = np.where(np.isin(np.arange(config.num_experts) // size, open_), ranked, -np.inf)
    chosen = np.argsort(-ranked, kind="stable")[: config.experts_per_token]
    total = scores[chosen].sum() if config.normalize_weights else 1.0
    whole, y = x, 0.0
    if config.latent is not None:
        x = x @ _value(module.latent_in) + (_value(module.latent_in_bias) if config.latent_bias else 0.0)
    for expert in chosen:
        weight = config.weight_scale * scores[expert] / total
        weight *= _value(module.expert_scale)[expert] if config.expert_scale else 1.0
        read = x * weight if config.weighted == "inputs" else x
        gate, *up = np.tensordot(read, _value(module.up)[expert], axes=1) + (
            _value(module.up_bias)[expert] if config.bias else 0.0
        )
        if config.swiglu_limit is None:
            made = ACTIVATIONS[config.activation](gate) * (up[0] if config.gated else 1.0)
        else:
            gate, up = np.minimum(gate, config.swiglu_limit), np.clip(up[0], -config.swiglu_limit, config.swiglu_limit)
            made = (up + 1) * gate / (1 + np.exp(-config.swiglu_alpha * gate))
        made = made @ _value(module.down)[expert] + (_value(module.down_bias)[expert] if config.bias else 0.0)
        y = y + (made if config.weighted == "inputs" else weight * made)
    if config.latent is not None:
        y = y @ _value(module.latent_out) + (_value(module.latent_out_bias) if config.latent_bias else 0.0)
    if config.shared is None:
        return y
    x = whole
    shared = mlp(module.shared, config.shared, x)
    return y + shared / (1 + np.exp(-x @ _value(module.shared_gate)) if config.shared_gate else 1.0)


def mlp(module, config, x: np.ndarray) -> np.ndarray:
    if hasattr(config, "num_experts"):
        return experts(module, config, x)
    if hasattr(config, "experts"):
        routed = norm(x, module.router_norm) / math.sqrt(len(x))
        dense = mlp(module.dense, config.dense, norm(x, module.dense_norm))
        chosen = experts(module.experts, config.experts, norm(x, module.experts_norm), routed)
        return norm(dense, module.dense_post_norm) + norm(chosen, module.experts_post_norm)
    hidden = np.tensordot(x, _value(module.up), axes=1)  # [gates, width]
    if module.up_bias is not None:
        hidden = hidden + _value(module.up_bias)
    active = ACTIVATIONS[config.activation](config.gate_scale * hidden[0])
    active = active * hidden[1] if config.gated else active
    y = active @ _value(module.down)
    return config.out_scale * (y if module.down_bias is None else y + _value(module.down_bias))


def block(layer, x: np.ndarray, cache: list, rule: Rule, state: list, handed: list, given: np.ndarray) -> np.ndarray:
    """`cache` has keys and values; `given` is what the layer is told of the token by itself; `state` is a recurrent
    mixer's, in their place or beside them; `handed` has what layers hand on of the token."""
    config = layer.config

    def before(x: np.ndarray, module) -> np.ndarray:
        return norm(x, module) if config.pre_norms else x

    def behind(y: np.ndarray, module) -> np.ndarray:
        return config.residual_scale * (norm(y, module) if config.post_norms else y)

    normed = before(x, layer.mixer_norm)
    if config.mixer.recurrent:
        mixed = _mixed(layer.mixer, normed, state, handed)
    else:
        attend = latent_attention if config.mixer.type_name == "latent_attention" else attention
        mixed = attend(layer, normed, cache, rule)
    if config.beside is not None:
        mixed = mixed + _mixed(layer.beside, normed, state, handed)
    mixed = behind(mixed, layer.mixer_post_norm)
    if config.residual == "sequential":
        x = x + mixed
        mixed = 0.0
    if config.mlp is None:
        return x
    own = hasattr(config.mlp, "experts")
    y = mlp(layer.mlp, config.mlp, normed if config.shared_norm else x if own else before(x, layer.mlp_norm))
    y = x + mixed + behind(y, layer.mlp_post_norm)
    if layer.layer_input is not None:
        p = layer.layer_input
        y = y + norm((ACTIVATIONS[p.activation](y @ _value(p.gate)) * given) @ _value(p.out), p.norm)
    return y if layer.scale is None else y * _value(layer.scale)


def _mixed(mixer, x: np.ndarray, state: list, handed: list) -> np.ndarray:
    name = mixer.config.type_name
    return MIXERS[name](mixer, x, state, *([handed] if name in HANDING else []))


def _own_rule(mixer) -> Rule | None:
    """What a layer keeps as pretrained, where that is not everything."""
    if mixer.recurrent:
        return DENSE
    if mixer.chunk is not None:
        return Chunks(size=mixer.chunk)
    return None if mixer.window is None else Rule(0, mixer.window - 1)


def layer_inputs(model, token: int, x: np.ndarray) -> np.ndarray:
    """What each layer is told of a token by itself, [L, P]; L zeros where layers are told nothing."""
    layers = model.config.num_layers
    if model.layer_inputs is None:
        return np.zeros(layers)
    p = model.layer_inputs
    own = _value(p.table)[token].reshape(layers, -1)
    made = norm((x @ _value(p.projection) / math.sqrt(len(x))).reshape(layers, -1), p.norm)
    return (made + own * math.sqrt(own.shape[1])) / math.sqrt(2)


def run(model, tokens, rule: Rule) -> np.ndarray:
    """Logits [T, V] of one stream, read token by token.

    `rule` is for layers with full attention; a layer with a sliding window W of its own keeps its last W - 1 tokens,
    one that attends within chunks those of its chunk.
    """
    config = model.config
    layers = [model.layer(i) for i in range(config.num_layers)]
    rules = [_own_rule(block.mixer) or rule for block in config.blocks]
    caches: list[list] = [[] for _ in layers]
    states: list[list] = [[] for _ in layers]
    embedding = _value(model.embedding)
    head = embedding.T if model.head is None else _value(model.head)
    rows = []
    for token in tokens:
        x = embedding[int(token)] * config.embedding_scale
        x = x if model.embedding_norm is None else norm(x, model.embedding_norm)
        handed: list = []
        given = layer_inputs(model, int(token), x)
        for i, layer in enumerate(layers):
            source = config.blocks[i].mixer.keys_of
            source = i if source is None else source
            x = block(layer, x, caches[source], rules[source], states[i], handed, given[i])
        caches = [kept.keep(cache) for kept, cache in zip(rules, caches, strict=True)]
        logits = norm(x, model.norm) @ head
        if model.head_bias is not None:
            logits = logits + _value(model.head_bias)
        logits = config.logit_scale * logits
        if config.logit_softcap is not None:
            logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
        rows.append(logits)
    return np.stack(rows)
