"""Serve a model by OpenAI's HTTP API: many conversations at once, none of which has an end, in memory of constant size.

    python -m infer.serve --model=Qwen3-0.6B                         # then open http://127.0.0.1:8000
    python -m infer.serve --model=Qwen3-0.6B --cache=streaming_llm:sinks=4,window=4092 --rows=32
    python -m infer.serve --model=Qwen3-0.6B --state_dir=conversations --port=9000
    STREAMJAX_API_KEYS=key1,key2 python -m infer.serve --model=Qwen3-0.6B --host=0.0.0.0

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "Qwen3-0.6B", "messages": [{"role": "user", "content": "Hello"}], "conversation": "mine"}'

With "conversation" the server keeps the stream: the next request sends its new message alone, and nothing is read
twice. --state_dir keeps conversations over a restart. Without it, and without "conversation", requests are as those of
any server: each sends all its messages, and prefixes that are known are not read again. The page at / is a chat that
shows the cache. docs/serving.md lists fields and endpoints. It takes pip install 'streamjax[serve]'.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands.chat import template_values
from streamjax.commands.flags.adapters import named_adapters
from streamjax.commands.flags.cache import parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.draft import parse_draft, parse_draft_memory
from streamjax.commands.flags.engine import define_engine, make_service, refuse_mesh
from streamjax.commands.flags.model import load_model
from streamjax.commands.shell.runner import run_command
from streamjax.evaluation import human_bytes
from streamjax.kv.description import describe_cache
from streamjax.serving.engine import Engine
from streamjax.serving.http.app import make_app
from streamjax.serving.http.connections import listen, make_server
from streamjax.serving.simultaneous.streams import SimultaneousStreams

_KEYS = "STREAMJAX_API_KEYS"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def define(values: flags.FlagValues) -> None:
    define_engine(values)
    flags.DEFINE_float("step_ms", None, "Milliseconds that streams may wait from a token to the next one while prompts "
                       "are read: as few tokens of these are read at a time as that asks, at most --chunk_size. By "
                       "default always --chunk_size.", lower_bound=1e-3, flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("narrow", None, "Where few streams decode, compute few rows: a lone one is faster then, and "
                         "the last bits of what a stream computes depend on how many others run. By default on CPUs.",
                         flag_values=values)  # fmt: skip
    flags.DEFINE_enum("policy", "fcfs", ["fcfs", "mlfq"], "Which requests run: those that came first, or short answers "
                      "before long ones.", flag_values=values)  # fmt: skip
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all of this machine's.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 is any that is free.", lower_bound=0, upper_bound=65535,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_integer("simultaneous", 0, "Clients at a time that are answered while they still speak, over the "
                         "websocket and by wait-k (docs/serving.md): each has a stream of two groups of tokens.",
                         lower_bound=0, flag_values=values)  # fmt: skip
    flags.DEFINE_string("state_dir", None, "Folder where conversations are kept.", flag_values=values)
    flags.DEFINE_integer("max_requests", 1024, "Requests in the server at once; more get status 429.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_integer("max_body_mib", 16, "The largest request.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("shutdown_seconds", 30, "That answers under way have after SIGTERM or Ctrl-C.", lower_bound=0,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_multi_string(
        "template_kwargs", [], "NAME=VALUE for the model's chat template, such as enable_thinking=false. VALUE is "
        "JSON, or else text; may be repeated.", flag_values=values,
    )  # fmt: skip
    refuse_empty(values, "state_dir", "name", "host")


def api_keys(text: str | None) -> list[str]:
    """The keys in the environment's variable, between commas.

    Raises:
      ValueError: it is there, and has none.
    """
    if text is None:
        return []
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise ValueError(f"{_KEYS} is set and has no key: unset it, or give keys with commas between them")
    return keys


def body(values: flags.FlagValues) -> None:
    refuse_mesh(values)
    keys = api_keys(os.environ.get(_KEYS))
    extra = template_values(values.template_kwargs)
    adapters = named_adapters(values.adapter)
    state_dir = user_path(values.state_dir) if values.state_dir else None
    with listen(values.host, values.port) as own:  # before the model is read, which takes long
        model, tokenizer = load_model(values, [values.cache])
        cache = parse_cache(values.cache, model.config.max_position)
        engine = Engine(
            model, tokenizer, cache,
            rows=values.rows, chunk_size=values.chunk_size, queue=values.max_requests, policy=values.policy,
            step_seconds=None if values.step_ms is None else values.step_ms / 1e3,
            narrow=jax.default_backend() == "cpu" if values.narrow is None else values.narrow,
            fused=values.fused, state_dir=state_dir, pool_tokens=values.pool_tokens, adapters=adapters,
            draft=parse_draft(values.draft, model, tokenizer), draft_memory=parse_draft_memory(values),
        )  # fmt: skip
        about = f"{values.rows} rows, cache {describe_cache(cache)}, {human_bytes(engine.stats().cache_bytes)}"
        if engine.draft_memory is not None:
            about += f"; {engine.draft_memory}"
        simultaneous = None
        if values.simultaneous:
            simultaneous = SimultaneousStreams(model, tokenizer, cache, values.simultaneous, values.chunk_size)
            about += f"; {values.simultaneous} simultaneous streams of {human_bytes(simultaneous.stream_bytes)}"
        print(f"{Path(values.model).name}: {about}; compiling", file=sys.stderr, flush=True)
        engine.warm_up()
        if simultaneous is not None:
            simultaneous.warm_up()
        service = make_service(
            values,
            engine,
            model,
            tokenizer,
            adapters,
            trained_length=model.config.max_position,
            cache_words=describe_cache(cache),
            cache_sizes=sj.kv.describe(cache, model),
            template_values=extra,
            most_requests=values.max_requests,
            simultaneous=simultaneous,
        )
        app = make_app(
            service, keys=keys, largest_body=values.max_body_mib << 20, any_host=values.host not in _LOOPBACK
        )
        make_server(app, shutdown_seconds=values.shutdown_seconds).run(sockets=[own])


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
