"""Streaming DiLoCo (2501.18512, algorithm 2) as a plain loop over replicas, parameters and numbers, in numpy."""

import math

import numpy as np


def e3m0(x, scaled):
    """The numbers that arrive where `x` is sent in four bits, one after the other, each the nearest that there is."""
    x = np.asarray(x)
    rows = x.reshape(*x.shape[:scaled], -1)
    sent = np.zeros(rows.shape)
    for place in np.ndindex(*rows.shape[:-1]):
        top = np.max(np.abs(rows[place]))
        scale = float(np.asarray(top, dtype="bfloat16"))
        there = [0.0, *(scale * 2.0**power for power in range(-6, 1))]
        for i, value in enumerate(rows[place]):
            nearest = min(reversed(there), key=lambda size: abs(abs(value) - size))
            sent[(*place, i)] = math.copysign(nearest, value)
    return sent.reshape(x.shape)


def train(start, inner, fragments, scaled, config, steps):
    """Parameters of each replica, and those that were agreed on, behind `steps` steps.

    start: arrays by name. inner(replica, step, params) -> params: a step of a replica's own optimizer.
    fragments: a list of names for each. scaled: dimensions of a parameter that have scales of their own, by name.
    """
    replicas = [dict(start) for _ in range(config.replicas)]
    agreed = dict(start)
    momentum = {name: np.zeros_like(x) for name, x in start.items()}
    on_the_way = []
    for step in range(steps):
        replicas = [inner(number, step, params) for number, params in enumerate(replicas)]
        done = step + 1
        for number, names in enumerate(fragments):
            if done % config.sync_interval == number * config.sync_interval // config.fragments:
                moved = {
                    name: [e3m0(agreed[name] - params[name], scaled[name]) for params in replicas] for name in names
                }
                on_the_way.append((done + config.overlap, moved))
        for _, moved in [message for message in on_the_way if message[0] == done]:
            for name, values in moved.items():
                gradient = sum(values) / len(values)
                momentum[name] = config.outer_momentum * momentum[name] + gradient
                ahead = gradient + config.outer_momentum * momentum[name]
                agreed[name] = agreed[name] - config.outer_learning_rate * ahead
                for params in replicas:
                    params[name] = config.mixing * params[name] + (1 - config.mixing) * agreed[name]
        on_the_way = [message for message in on_the_way if message[0] > done]
    return replicas, agreed
