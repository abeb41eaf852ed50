"""Flags that say how tokens are chosen."""

from __future__ import annotations

from absl import flags

import streamjax as sj


def define_sampling(values: flags.FlagValues) -> None:
    """Flags that say how tokens are chosen."""
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    number("temperature", 0.8, "0 always takes the likeliest token.", lower_bound=0, flag_values=values)
    whole("top_k", 0, "Choose among the k likeliest tokens; 0: all.", lower_bound=0, flag_values=values)
    number("top_p", 0.95, "Choose among the likeliest tokens that together have this probability.", flag_values=values)
    number("min_p", 0.0, "Choose among tokens at least this share as likely as the likeliest.", flag_values=values)
    number("repetition_penalty", 1.0, "Above 1, tokens that were used become less likely.", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "Text that ends an answer, \\n for a line's end; may be repeated.", flag_values=values
    )
    whole("seed", 0, "Of the random choices.", flag_values=values)
    whole("max_new_tokens", 512, "The longest answer.", lower_bound=0, flag_values=values)


def sampler_of(values: flags.FlagValues) -> sj.Sampler:
    """The sampler that the flags describe."""
    return sj.Sampler(
        repetition_penalty=values.repetition_penalty,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
    )


def stop_strings(values: flags.FlagValues) -> list[str]:
    """The strings that end an answer."""
    return [word.replace("\\n", "\n").replace("\\t", "\t") for word in values.stop]


def sampling_was_chosen(values: flags.FlagValues) -> bool:
    """Whether any flag of the sampler was given."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return any(values[name].present for name in names)
