"""Answer a file of requests that nobody waits for: OpenAI's batch files, JSON lines in and out, in the best order.

    python -m infer.batch --model=Qwen3-0.6B --input=requests.jsonl --output=answers.jsonl
    python -m infer.batch --model=Qwen3-0.6B --input=requests.jsonl --output=answers.jsonl --cache=dense --rows=32

A line of the input is {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model":
"Qwen3-0.6B", "messages": [...]}}, or is for /v1/completions. Answers are appended as they come, in any order. A job
that was stopped goes on: the same command answers what is not answered yet. Requests with a common beginning stand
together, so that it is read once, and long prompts beside long answers; --order=file keeps the file's order. It takes
pip install 'streamjax[serve]'.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from absl import flags

from streamjax.checkpoints import user_path
from streamjax.commands.flags.adapters import named_adapters
from streamjax.commands.flags.cache import parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.draft import parse_draft, parse_draft_memory
from streamjax.commands.flags.engine import define_engine, make_service, refuse_mesh
from streamjax.commands.flags.model import load_model
from streamjax.commands.shell.outputs import in_made_folder
from streamjax.commands.shell.progress import progress_bar
from streamjax.commands.shell.runner import run_command
from streamjax.serving.engine import Engine
from streamjax.serving.offline.answering import answer_all, prepare, size_of
from streamjax.serving.offline.batch_files import answer_line, answered, read_requests
from streamjax.serving.offline.ordering import order_requests

_AHEAD = 4  # requests in the engine for each row: it looks ahead for prompts that begin alike


def define(values: flags.FlagValues) -> None:
    define_engine(values)
    flags.DEFINE_string("input", None, "File of requests.", flag_values=values)
    flags.DEFINE_string("output", None, "File that answers are appended to.", flag_values=values)
    flags.DEFINE_integer("prefix_mib", 1024, "Memory for what requests begin with.", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("order", "prefix", ["prefix", "file"], "Which request comes next.", flag_values=values)
    refuse_empty(values, "input", "output", "name")


def body(values: flags.FlagValues) -> None:
    refuse_mesh(values)
    for name, holds in (("input", "requests"), ("output", "answers")):
        if values[name].value is None:
            raise ValueError(f"flag --{name} is missing: name the file of {holds}")
    source, target = user_path(values.input), user_path(values.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--output={values.output} is the file of requests: name another one")
    adapters = named_adapters(values.adapter)
    lines = read_requests(source)
    done = answered(target)
    left = [line for line in lines if line.custom_id not in done]
    print(f"{len(lines) - len(left)} of {len(lines)} requests are answered already", file=sys.stderr)
    if not left:
        return
    try:
        file = in_made_folder(values.output).open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{target}: it cannot be written ({error.strerror})") from error
    with file:
        model, tokenizer = load_model(values, [values.cache])
        engine = Engine(
            model, tokenizer, parse_cache(values.cache, model.config.max_position),
            rows=values.rows, chunk_size=values.chunk_size, queue=1 << 30, pool_tokens=values.pool_tokens,
            fused=values.fused, prefix_bytes=values.prefix_mib << 20, adapters=adapters,
            draft=parse_draft(values.draft, model, tokenizer), draft_memory=parse_draft_memory(values),
        )  # fmt: skip
        service = make_service(values, engine, model, tokenizer, adapters, most_requests=1 << 30)
        try:
            calls = [(line.custom_id, prepare(service, line)) for line in left]
            if values.order == "prefix":
                prompts, tokens = zip(*(size_of(call) for _, call in calls), strict=True)
                calls = [calls[i] for i in order_requests(prompts, tokens, values.chunk_size, values.rows)]
            engine.warm_up()
            engine.start()
            began, failed = time.monotonic(), 0
            with progress_bar(total=len(lines), initial=len(lines) - len(left), unit=" requests") as bar:

                def write(name: str, status: int, answer: dict[str, Any]) -> None:
                    nonlocal failed
                    failed += status != 200
                    file.write(answer_line(name, status, answer))
                    file.flush()
                    bar.update()

                asyncio.run(answer_all(service, calls, _AHEAD * values.rows, write))
        finally:
            service.close()
    stats, seconds = engine.stats(), time.monotonic() - began
    print(
        f"{len(left)} requests in {seconds:.1f} s, {len(left) / seconds:.2f} a second, {failed} refused or failed; "
        f"read {stats.prompt_tokens} tokens, spared {stats.cached_tokens}, wrote {stats.generated_tokens}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
