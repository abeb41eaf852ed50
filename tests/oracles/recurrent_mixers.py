"""Recurrent token mixers token by token in float64 numpy, as their papers and reference models write them.

A layer keeps the last inputs of its convolution and a matrix for each head. Nothing here comes from the library but the
weights, whose channels lie in groups. The first argument is the mixer's module.
"""

import numpy as np


def _value(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x / (1 + np.exp(-x))


def _softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def _convolved(module, x: np.ndarray, seen: list) -> np.ndarray:
    """The newest token's output; `seen` are inputs, to which it is added."""
    weight = _value(module.weight)  # [width, G, D]
    seen.append(x)
    y = sum(weight[-1 - back] * seen[-1 - back] for back in range(min(len(weight), len(seen))))
    return y if module.bias is None else y + _value(module.bias)


def _norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps)


def gated_delta(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of Gated DeltaNet; `cache` has the inputs of the convolution and the states."""
    p, c = mixer, mixer.config
    shared, k_dim, v_dim = c.num_heads // c.num_groups, c.key_dim, c.value_dim
    if not cache:
        cache += [[], np.zeros((c.num_heads, k_dim, v_dim))]
    inside = np.tensordot(x, _value(p.inside), axes=1)  # [G, channels]
    first, last = 2 * k_dim + shared * v_dim, 2 * k_dim + 2 * shared * v_dim
    mixed = _silu(_convolved(p.conv, inside[:, :first], cache[0]))
    out = np.zeros((c.num_heads, v_dim))
    for head in range(c.num_heads):
        g, r = divmod(head, shared)
        q, k = mixed[g, :k_dim], mixed[g, k_dim : 2 * k_dim]
        q, k = (y / np.sqrt(y @ y + 1e-6) for y in (q, k))
        v = mixed[g, 2 * k_dim + r * v_dim :][:v_dim]
        write = (1 + c.negative_eigenvalues) * _sigmoid(inside[g, last + r])
        step = _softplus(inside[g, last + shared + r] + _value(p.step_bias)[head])
        state = np.exp(-np.exp(_value(p.rate_log)[head]) * step) * cache[1][head]
        cache[1][head] = state + np.outer(k, write * (v - state.T @ k))
        read = cache[1][head].T @ (q / np.sqrt(k_dim))
        read = _norm(read, c.norm.eps) * (_value(p.norm.weight) + c.norm.offset)
        out[head] = read * _silu(inside[g, first + r * v_dim :][:v_dim])
    return np.tensordot(out.reshape(c.num_groups, shared, v_dim), _value(p.out), axes=3)


def kimi_delta(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of Kimi Delta Attention; `cache` has the inputs of the convolution and the states."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [[], np.zeros((c.num_heads, c.key_dim, c.value_dim))]
    inside = np.tensordot(x, _value(p.inside), axes=1)
    mixed = _silu(_convolved(p.conv, inside[:, :-1], cache[0]))
    low = np.tensordot(x, _value(p.down), axes=1)
    steps, gates = np.tensordot(low[0], _value(p.step_up), axes=1), np.tensordot(low[1], _value(p.gate_up), axes=1)
    out = np.zeros((c.num_heads, 1, c.value_dim))
    for head in range(c.num_heads):
        q, k = mixed[head, : c.key_dim], mixed[head, c.key_dim : 2 * c.key_dim]
        q, k = (y / np.sqrt(y @ y + 1e-6) for y in (q, k))
        decay = np.exp(-np.exp(_value(p.rate_log)[head]) * _softplus(steps[head] + _value(p.step_bias)[head]))
        state = decay[:, None] * cache[1][head]
        written = _sigmoid(inside[head, -1]) * (mixed[head, 2 * c.key_dim :] - state.T @ k)
        cache[1][head] = state + np.outer(k, written)
        read = _norm(cache[1][head].T @ (q / np.sqrt(c.key_dim)), c.norm.eps)
        out[head, 0] = read * (_value(p.norm.weight) + c.norm.offset) * _sigmoid(gates[head])
    return np.tensordot(out, _value(p.out), axes=3)


def ssd(mixer, x: np.ndarray, cache: list, handed: list) -> np.ndarray:
    """One token of Mamba-2; `cache` has the inputs of the convolution and the states."""
    p, c = mixer, mixer.config
    shared, width, size = c.num_heads // c.num_groups, c.head_dim, c.state_dim
    if not cache:
        cache += [[], np.zeros((c.num_heads, size, width))]
    inside = np.tensordot(x, _value(p.inside), axes=1)
    inside = inside if p.inside_bias is None else inside + _value(p.inside_bias)
    inner = shared * width
    if c.scales:
        inside = inside * np.repeat(c.scales, (inner, size, size, inner, shared))
    mixed = _silu(_convolved(p.conv, inside[:, : inner + 2 * size], cache[0]))
    gate, steps = inside[:, inner + 2 * size : 2 * inner + 2 * size], inside[:, 2 * inner + 2 * size :]
    out = np.zeros((c.num_groups, inner))
    for head in range(c.num_heads):
        g, r = divmod(head, shared)
        own = slice(r * width, (r + 1) * width)
        b, read = mixed[g, inner : inner + size], mixed[g, inner + size :]
        step = np.clip(_softplus(steps[g, r] + _value(p.step_bias)[head]), c.step_min, c.step_max)
        decay = np.exp(-np.exp(_value(p.rate_log)[head]) * step)
        cache[1][head] = decay * cache[1][head] + np.outer(b, step * mixed[g, own])
        out[g, own] = cache[1][head].T @ read + _value(p.skip)[head] * mixed[g, own]
    if c.hands_on:
        handed[:] = [out]
    if c.norm is None:
        out = out * _silu(gate)
    else:
        y = out if c.norm_before_gate else out * _silu(gate)
        normed = _norm(y, c.norm.eps) if c.norm_groups == 1 else np.stack([_norm(row, c.norm.eps) for row in y])
        out = normed * _value(p.norm) * (_silu(gate) if c.norm_before_gate else 1.0)
    y = np.tensordot(out.reshape(c.num_groups, shared, width), _value(p.out), axes=3)
    return c.out_scale * (y if p.out_bias is None else y + _value(p.out_bias))


def gmu(mixer, x: np.ndarray, cache: list, handed: list) -> np.ndarray:
    """One token of the gated memory unit; `handed` has what heads of a layer below have read."""
    gated = _silu(np.tensordot(x, _value(mixer.inside), axes=1)) * handed[0].reshape(mixer.config.num_groups, -1)
    return np.tensordot(gated[:, None], _value(mixer.out), axes=3)


def gated_conv(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of LFM2's convolution between gates; `cache` has its inputs."""
    p = mixer
    inside = np.tensordot(x, _value(p.inside), axes=1)
    inside = inside if p.inside_bias is None else inside + _value(p.inside_bias)
    into, out, values = np.split(inside, 3, axis=-1)
    y = np.tensordot((out * _convolved(p.conv, into * values, cache))[:, None], _value(p.out), axes=3)
    return y if p.out_bias is None else y + _value(p.out_bias)


def rg_lru(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of Griffin's recurrent block; `cache` has the inputs of the convolution and the state."""
    p, c = mixer, mixer.config
    first = not cache
    if first:
        cache += [[], np.zeros((c.num_groups, c.channels))]
    inside = np.tensordot(x, _value(p.inside), axes=1) + _value(p.inside_bias)
    branch, out = _convolved(p.conv, inside[:, : c.channels], cache[0]), inside[:, c.channels :]

    def gate(weight, bias):
        return _sigmoid(np.einsum("gc,gcd->gd", branch, _value(weight)) + _value(bias))

    decay = np.exp(-8 * gate(p.decay_gate, p.decay_gate_bias) * _softplus(_value(p.rate)))
    added = branch * gate(p.input_gate, p.input_gate_bias)
    cache[1] = decay * cache[1] + added * (1.0 if first else np.sqrt(1 - decay**2))
    assert c.activation == "gelu_tanh"
    open_ = 0.5 * out * (1 + np.tanh(np.sqrt(2 / np.pi) * (out + 0.044715 * out**3)))
    return np.tensordot((cache[1] * open_)[:, None], _value(p.out), axes=3) + _value(p.out_bias)


def gated_linear(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of gated linear attention; `cache` has the states."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [np.zeros((c.num_heads, c.key_dim, c.value_dim))]
    inside = np.tensordot(x, _value(p.inside), axes=1)
    decay = _sigmoid(np.tensordot(x @ _value(p.down), _value(p.up), axes=1) + _value(p.up_bias))
    out = np.zeros((c.num_heads, 1, c.value_dim))
    for head in range(c.num_heads):
        q, k, v, gate = np.split(inside[head], np.cumsum([c.key_dim, c.key_dim, c.value_dim]))
        cache[0][head] = (decay[head] ** (1 / c.decay_power))[:, None] * cache[0][head] + np.outer(k, v)
        read = _norm(cache[0][head].T @ (q / np.sqrt(c.key_dim)), c.norm.eps)
        out[head, 0] = read * _value(p.norm.weight) * _silu(gate)
    return np.tensordot(out, _value(p.out), axes=3)


def _least(mixer) -> np.ndarray:
    """The least decay of each channel; a learned one is what the test has put there."""
    c = mixer.config
    if c.lower_bound == "learned":
        return np.exp(_value(mixer.bound)[0])
    return np.full((c.num_groups, c.state_shape[1 if c.type_name == "hgrn2" else 2]), c.lower_bound)


def hgrn2(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of HGRN2; `cache` has the states."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [np.zeros((c.num_heads, c.key_dim, c.value_dim))]
    inside = np.tensordot(x, _value(p.inside), axes=1)
    out = np.zeros((c.num_heads, c.value_dim))
    for head in range(c.num_heads):
        q, raw, v = np.split(inside[head], [c.key_dim, 2 * c.key_dim])
        decay = _least(p)[head] + (1 - _least(p)[head]) * _sigmoid(raw)
        cache[0][head] = decay[:, None] * cache[0][head] + np.outer(1 - decay, v)
        out[head] = cache[0][head].T @ (_silu(q) / np.sqrt(c.key_dim))
    return np.tensordot((_norm(out, c.norm.eps) * _value(p.norm))[:, None], _value(p.out), axes=3)


def hgrn(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of HGRN; `cache` has the state."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [np.zeros((c.num_heads, c.channels))]
    values, raw, gate = np.split(np.tensordot(x, _value(p.inside), axes=1), 3, axis=-1)
    decay = _least(p) + (1 - _least(p)) * _sigmoid(raw)
    cache[0] = decay * cache[0] + (1 - decay) * _silu(values)
    out = _norm(cache[0], c.norm.eps) * _value(p.norm) * _silu(gate)
    return np.tensordot(out[:, None], _value(p.out), axes=3)


def rwkv7(mixer, x: np.ndarray, cache: list, handed: list) -> np.ndarray:
    """One token of RWKV-7's time mixing; `cache` has the input before and the states."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [np.zeros_like(x), np.zeros((c.num_heads, c.head_dim, c.head_dim))]
    xr, xk, xv, xw, xa, xg = x + (cache[0] - x) * _value(p.mix)
    cache[0] = x
    kernels, down, up = (_value(part) for part in (p.inside, p.down, p.up))
    bias, weights, norm = (_value(part) for part in (p.bias, p.keys, p.norm))
    ends = np.cumsum(c.ranks)[:-1]
    down, up = np.split(down, ends, axis=1), np.split(up, ends)
    out, values = np.zeros((c.num_heads, 1, c.head_dim)), np.zeros((c.num_heads, c.head_dim))
    for head in range(c.num_heads):
        w_q, w_k, w_v = np.split(kernels[:, head], 3, axis=-1)
        r, k, v = xr @ w_q, xk @ w_k, xv @ w_v
        values[head] = v
        if c.values == "takes":
            v = v + (handed[0][head] - v) * _sigmoid(xv @ down[3] @ up[3][:, head] + bias[2, head])
        decay = np.exp(-np.exp(-0.5) * _sigmoid(np.tanh(xw @ down[0]) @ up[0][:, head] + bias[0, head]))
        a = _sigmoid(xa @ down[1] @ up[1][:, head] + bias[1, head])
        gate = _sigmoid(xg @ down[2]) @ up[2][:, head]
        kappa = k * weights[0, head]
        kappa = kappa / np.sqrt(kappa @ kappa)
        k = k * (1 + (a - 1) * weights[1, head])
        old = cache[1][head]
        cache[1][head] = decay[:, None] * old - np.outer(a * kappa, old.T @ kappa) + np.outer(k, v)
        read = cache[1][head].T @ r
        read = (read - read.mean()) / np.sqrt(read.var() + c.norm_eps) * norm[0, head] + norm[1, head]
        out[head, 0] = (read + (r * k * weights[2, head]).sum() * v) * gate
    if c.values == "hands_on":
        handed[:] = [values]
    return np.tensordot(out, _value(p.out), axes=3)


def channel_mix(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of RWKV-7's channel mixing; `cache` has the input before."""
    before = cache[0] if cache else np.zeros_like(x)
    cache[:] = [x]
    inside, out = _value(mixer.inside), _value(mixer.out)
    hidden = np.tensordot(x + (before - x) * _value(mixer.shift), inside, axes=1)
    return np.tensordot(np.maximum(hidden, 0)[:, None] ** 2, out, axes=3)


def mixture_of_memories(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of a mixture of memories; `cache` has the inputs of the convolution and the states."""
    p, c = mixer, mixer.config
    count = c.memories + 1
    if not cache:
        cache += [[], np.zeros((c.num_heads, count, c.key_dim, c.value_dim))]
    inside = np.tensordot(x, _value(p.inside), axes=1)
    ends = np.cumsum([c.key_dim, count * c.key_dim, count * c.value_dim, c.value_dim, count])
    mixed = _silu(_convolved(p.conv, inside[:, : ends[2]], cache[0]))
    scores = np.exp(x @ _value(p.router))
    chosen = np.argsort(-scores)[: c.active]
    shares = np.zeros(count)
    shares[chosen], shares[-1] = scores[chosen] / scores[chosen].sum(), 1.0
    rates, biases = (_value(part).reshape(c.num_heads, count) for part in (p.rate_log, p.step_bias))
    out = np.zeros((c.num_heads, 1, c.value_dim))
    for head in range(c.num_heads):
        q, keys, values = np.split(mixed[head], ends[:2])
        gate, writes, steps = np.split(inside[head, ends[2] :], ends[3:] - ends[2])
        read = np.zeros(c.value_dim)
        for memory in np.flatnonzero(shares):
            k, v = keys.reshape(count, -1)[memory], values.reshape(count, -1)[memory]
            k = k / np.sqrt(k @ k + 1e-6)
            step = _softplus(steps[memory] + biases[head, memory])
            state = np.exp(-np.exp(rates[head, memory]) * step) * cache[1][head, memory]
            state = state + np.outer(k, _sigmoid(writes[memory]) * (v - state.T @ k))
            cache[1][head, memory] = state
            read += shares[memory] * state.T @ (q / np.sqrt(q @ q + 1e-6) / np.sqrt(c.key_dim))
        out[head, 0] = _norm(read, c.norm.eps) * _value(p.norm.weight) * _silu(gate)
    return np.tensordot(out, _value(p.out), axes=3)


def _linear_weight(config, q: np.ndarray, k: np.ndarray) -> float:
    """How much a query reads of a key: without features, where there is a formula without them."""
    if config.features == "elu":
        return np.dot(*(np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0))) for x in (q, k)))
    product = q @ k / np.sqrt(len(q))
    return 1 + product + product**2 / 2


def first_look(mixer, prefix: list, cache: list) -> None:
    """Keys and values of a prefix's inputs, as prefix linear attention has them before it reads the first."""
    for x in prefix:
        made = np.tensordot(x, _value(mixer.first), axes=1)
        cache.append(np.split(made, [mixer.config.key_dim], axis=-1))


def prefix_linear(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of prefix linear attention; `cache` has keys and values of all that came before, and no state."""
    p, c = mixer, mixer.config
    q, k, v = np.split(np.tensordot(x, _value(p.inside), axes=1), [c.key_dim, 2 * c.key_dim], axis=-1)
    cache.append((k, v))
    out = np.zeros((c.num_heads, 1, c.value_dim))
    for head in range(c.num_heads):
        weights = [_linear_weight(c, q[head], keys[head]) for keys, _ in cache]
        out[head, 0] = sum(w * values[head] for w, (_, values) in zip(weights, cache, strict=True)) / sum(weights)
    return np.tensordot(out, _value(p.out), axes=3)


def legendre_memory(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of the Legendre memory unit; `cache` has the memories."""
    p, c = mixer, mixer.config
    if not cache:
        cache += [np.zeros((c.num_groups, c.order, c.channels))]
    row, column = np.indices((c.order, c.order))
    a = (2 * row + 1) * np.where(row < column, -1.0, (-1.0) ** (row - column + 1)) / c.theta
    b = (2 * np.arange(c.order) + 1) * (-1.0) ** np.arange(c.order) / c.theta
    spiking = c.unit == "spiking"
    if spiking:
        cache += [{}] * (len(cache) == 1)
        x = _spikes(cache[1], "input", x, 0.5)
    u = np.tensordot(x, _value(p.inside), axes=1) + _value(p.inside_bias)
    u = _spikes(cache[1], "u", _layer_normed(u, p.norms[0])) if spiking else np.maximum(u, 0)
    for _ in range(2000):  # the differential equation in small steps, each by the midpoint's slope
        here = np.einsum("nm,gmd->gnd", a, cache[0]) + b[:, None] * u[:, None]
        half = cache[0] + here / 4000
        cache[0] = cache[0] + (np.einsum("nm,gmd->gnd", a, half) + b[:, None] * u[:, None]) / 2000
    told = _spikes(cache[1], "memories", _layer_normed(cache[0], p.norms[1])) if spiking else cache[0]
    y = np.tensordot(told.reshape(c.num_groups, 1, -1), _value(p.out), axes=3)
    y = y + _value(p.out_bias) + x @ _value(p.direct)
    y = _spikes(cache[1], "output", _layer_normed(y, p.norms[2])) if spiking else np.maximum(y, 0)
    return y if c.unit == "plain" else y @ _value(p.after)


def _spikes(potentials: dict, name: str, x: np.ndarray, threshold: float = 1.0) -> np.ndarray:
    """One token of leaky neurons, each by itself; `potentials` by the names of layers of neurons."""
    old, fired = potentials.get(name, np.zeros_like(x)), np.zeros_like(x)
    new = old + (x - old) / 2
    for at in np.ndindex(*x.shape):
        if new[at] >= threshold:
            fired[at], new[at] = 1.0, 0.0
    potentials[name] = new
    return fired


def _layer_normed(x: np.ndarray, norm) -> np.ndarray:
    """LayerNorm of all numbers of x together."""
    flat = x.ravel() - x.mean()
    flat = flat / np.sqrt(np.mean(flat * flat) + 1e-5) * _value(norm.weight) + _value(norm.bias)
    return flat.reshape(x.shape)


def conv_embedding(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of LMUFormer's embedding; `cache` has the inputs of each convolution, and potentials."""
    c, width = mixer.config, len(x)
    if not cache:
        cache += [[np.zeros((c.conv_width, width)) for _ in range(c.depth + 1)], {}]
    inputs, potentials = cache

    def convolved(x, at):
        inputs[at] = np.concatenate((inputs[at][1:], x[None]))
        weight = _value(mixer.convs[at]).reshape(c.conv_width, width, width)
        return sum(inputs[at][tap] @ weight[tap] for tap in range(c.conv_width))

    for at in range(c.depth):
        made = convolved(x, at)
        if c.spiking:
            x = _spikes(potentials, at, _layer_normed(made, mixer.norms[at]))
        else:
            x = made = _layer_normed(np.maximum(made, 0), mixer.norms[at])
    return made + convolved(x, c.depth)


def spiking_mix(mixer, x: np.ndarray, cache: list) -> np.ndarray:
    """One token of LMUFormer's spiking channel mixer; `cache` has potentials."""
    cache += [{}] * (not cache)
    read = _spikes(cache[0], "input", x, 0.5)
    hidden = np.tensordot(read, _value(mixer.inside), axes=1) + _value(mixer.inside_bias)
    fired = _spikes(cache[0], "hidden", _layer_normed(hidden, mixer.norm))
    return np.tensordot(fired[:, None], _value(mixer.out), axes=3) + _value(mixer.out_bias)


HANDING = ("ssd", "gmu", "rwkv7")  # that take a list with what layers hand on, too
MIXERS = {
    "gated_delta": gated_delta,
    "kimi_delta": kimi_delta,
    "ssd": ssd,
    "gated_conv": gated_conv,
    "gmu": gmu,
    "rg_lru": rg_lru,
    "gated_linear": gated_linear,
    "hgrn2": hgrn2,
    "hgrn": hgrn,
    "rwkv7": rwkv7,
    "channel_mix": channel_mix,
    "mixture_of_memories": mixture_of_memories,
    "prefix_linear": prefix_linear,
    "legendre_memory": legendre_memory,
    "conv_embedding": conv_embedding,
    "spiking_mix": spiking_mix,
}
