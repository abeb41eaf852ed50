"""Talk with a model for as long as you like: its cache does not grow.

    python -m infer.chat --model=Qwen3-0.6B --cache=streaming_llm:sinks=4,window=4092
    python -m infer.chat --model=Llama-3.2-1B-Instruct --system="You are brief." --temperature=0
    python -m infer.chat --model=Qwen3-0.6B --draft=ngram              # the same words, sooner where they were said
    python -m infer.chat --model=Qwen3-0.6B --cache=dense --answer_cache=snapkv:window=32,size=480   # LoopServe
    python -m infer.chat --model=Qwen3-0.6B --load_state=yesterday.chat
    echo "What is a heap?" | python -m infer.chat --model=Qwen3-0.6B --max_new_tokens=100

A turn reads only what it adds, by the model's own chat template. Ctrl-C ends an answer, not the conversation. What has
left the cache is forgotten; /cache shows how far it reaches.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

import streamjax as sj
from streamjax.checkpoints import parse_json, user_path
from streamjax.commands.flags.cache import CACHE_HELP, parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.commands.flags.draft import define_draft, parse_draft, parse_draft_memory
from streamjax.commands.flags.meshes import define_cache_mesh, meshes_of
from streamjax.commands.flags.model import define_model, define_parse_special, define_side_network, describe, load_model
from streamjax.commands.flags.sampling import define_sampling, sampler_of, sampling_was_chosen, stop_strings
from streamjax.commands.shell.input_files import read_turn
from streamjax.commands.shell.outputs import check_outputs
from streamjax.commands.shell.runner import Stopped, complain, run_command
from streamjax.commands.shell.signals import ending_signals
from streamjax.data.text.control_characters import escape_controls
from streamjax.evaluation import SlotMemory, human_bytes
from streamjax.kv.description import describe_cache
from streamjax.streaming.compacting.reselecting import Reselection
from streamjax.streaming.conversation import Conversation
from streamjax.streaming.interrupts import undisturbed
from streamjax.streaming.speculative.memory import fit_draft

HELP = """\
/save FOLDER    keep the conversation
/load FOLDER    go on with one that was kept
/cache          what the model can still see, and what that takes
/cache NAME...  start over with another cache, such as window:window=512
/compact NAME... [TEXT]
                go on under another cache, such as snapkv, which keeps what matters to TEXT, or to what you said last
/reset          start over
/help           this list
/quit           leave (so does Ctrl-D)
Ctrl-C ends an answer. Anything else is for the model; a line that begins with // is said with one slash."""


class Quit(Exception):
    """The user wants to leave."""


def define(values: flags.FlagValues) -> None:
    define_model(values)
    define_side_network(values)
    define_parse_special(values)
    flags.DEFINE_string("cache", "streaming_llm", CACHE_HELP, flag_values=values)
    define_cache_mesh(values)
    flags.DEFINE_string("system", None, "Instructions that come before the conversation.", flag_values=values)
    flags.DEFINE_multi_string(
        "template_kwargs", [], "NAME=VALUE for the model's chat template, such as enable_thinking=false. VALUE is "
        "JSON, or else text; may be repeated.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("load_state", None, "Go on with the conversation in this folder.", flag_values=values)
    flags.DEFINE_string("save_state", None, "Folder where the conversation is kept at the end.", flag_values=values)
    refuse_empty(values, "load_state", "save_state")
    define_sampling(values)
    define_draft(values)
    flags.DEFINE_string(
        "answer_cache", None, "A smaller cache that answers read, chosen anew every --reselect_every tokens of what "
        "--cache holds; such as snapkv:window=32,size=480. By default answers read --cache.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("reselect_every", 16, "See --answer_cache.", lower_bound=1, flag_values=values)
    refuse_empty(values, "answer_cache")


class Chat:
    """The loop's state: a conversation, and the commands that change it.

    Args:
      values: parsed flags.
      say: writes text for the user.
    """

    def __init__(self, values: flags.FlagValues, say: Callable[[str], None]):
        self._values = values
        self._say = say
        self._model, self._tokenizer = load_model(values, [values.cache])
        self._draft = parse_draft(values.draft, self._model, self._tokenizer)
        self._draft_memory = parse_draft_memory(values)
        self._start_session(values.cache)
        self.commands: dict[str, Callable[[str], None]] = {
            "save": self.save, "load": self.load, "cache": self.cache, "compact": self.compact,
            "reset": self.reset, "help": self.help, "quit": self.quit,
        }  # fmt: skip

    def _start_session(self, cache: str) -> None:
        values = self._values
        mesh = meshes_of(values).cache
        self._cache = parse_cache(cache, self._model.config.max_position, on_mesh=mesh is not None)
        draft = self._draft
        if draft is not None and self._draft_memory is not None:
            draft, memory = fit_draft(draft, self._model, self._cache, self._draft_memory, sampler=sampler_of(values))
            print(memory, file=sys.stderr)
        self.session = sj.Session(
            self._model,
            self._tokenizer,
            self._cache,
            sampler=sampler_of(values),
            seed=values.seed,
            chunk_size=values.chunk_size,
            draft=draft,
            reselect=self._reselection(),
            cache_mesh=mesh,
        )
        self.conversation = self._new_conversation()

    def _reselection(self) -> Reselection | None:
        values = self._values
        if values.answer_cache is None:
            return None
        cache = parse_cache(values.answer_cache, self._model.config.max_position)
        if not isinstance(cache, sj.kv.Cache):
            raise ValueError(f"--answer_cache={values.answer_cache}: give one cache for all layers")
        return Reselection(cache, values.reselect_every)

    def _new_conversation(self) -> Conversation:
        values = self._values
        return Conversation(
            self.session,
            values.system,
            stop_strings(values),
            template_values(values.template_kwargs),
            parse_special=values.parse_special,
        )

    def describe(self) -> str:
        """What runs, in one line."""
        return describe(self._values.model, self._model, self._cache, self.session)

    def line(self, text: str) -> None:
        """Obey a command, or answer."""
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            if name not in self.commands:
                near = difflib.get_close_matches(name, self.commands, n=1)
                raise ValueError(
                    f"unknown command /{name}; {f'did you mean /{near[0]}?' if near else '/help lists all'}"
                )
            self.commands[name](rest.strip())
        elif text.strip():
            self.answer(text[1:] if text.startswith("//") else text)

    def answer(self, text: str) -> None:
        """Answer what the user says, piece by piece."""
        pieces = self.conversation.reply(text, max_new_tokens=self._values.max_new_tokens)
        try:
            for piece in pieces:
                self._say(piece)
        except KeyboardInterrupt:
            self._say(self.session.pending() + " [interrupted]")
        self._say("\n")

    def save(self, rest: str) -> None:
        """/save FOLDER"""
        path = _folder(rest, "save")
        self.session.save(path, {"conversation": self.conversation.to_json_dict()})
        self._say(f"saved at token {self.session.tokens_seen:,} in {path}\n")

    def load(self, rest: str) -> None:
        """/load FOLDER"""
        path = _folder(rest, "load")
        saved = self.session.load(path, lambda extra: Conversation.require_restorable(extra.get("conversation", {})))
        if sampling_was_chosen(self._values):
            self.session.sampler = sampler_of(self._values)
        self.conversation.restore(saved.get("conversation", {}))
        self.conversation.template_values |= template_values(self._values.template_kwargs)
        self._say(f"going on at token {self.session.tokens_seen:,}\n")

    def cache(self, rest: str) -> None:
        """/cache [NAME:OPTION=VALUE,...]"""
        if rest:
            self._start_session(rest)
            self._say("a new conversation: ")
        self._tell_cache()

    def compact(self, rest: str) -> None:
        """/compact NAME:OPTION=VALUE,... [TEXT]"""
        name, _, text = rest.partition(" ")
        if not name:
            raise ValueError("/compact takes a cache: /compact snapkv:window=256,size=256 what matters")
        cache = parse_cache(name, self._model.config.max_position)
        self.conversation.compact(cache, text.strip() or None)
        self._cache = cache
        self._tell_cache()

    def _tell_cache(self) -> None:
        slots = max(cache.slots for cache in self.session.state.caches)
        seen = self.session.tokens_seen
        in_use = SlotMemory.from_state(self.session.state).in_use(seen)
        self._say(
            f"{describe_cache(self._cache)}: {min(seen, slots):,} of {seen:,} tokens visible, "
            f"{human_bytes(in_use)} in use of {human_bytes(self.session.cache_bytes)}\n"
        )

    def reset(self, rest: str) -> None:
        """/reset"""
        self.session.reset(self._values.seed)
        self.conversation = self._new_conversation()
        self._say("a new conversation\n")

    def help(self, rest: str) -> None:
        """/help"""
        self._say(HELP + "\n")

    def quit(self, rest: str) -> None:
        """/quit"""
        raise Quit


def _folder(rest: str, command: str) -> str:
    try:
        words = shlex.split(rest)
    except ValueError as error:  # a quotation without its end
        raise ValueError(f"/{command} {rest}: {str(error).lower()}") from error
    if len(words) != 1 or not words[0]:
        raise ValueError(f"/{command} takes one folder: /{command} FOLDER")
    return str(user_path(words[0]))


def template_values(texts: Sequence[str]) -> dict[str, Any]:
    """What --template_kwargs says, by name.

    Raises:
      ValueError: no NAME=VALUE.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template_kwargs={text}: write NAME=VALUE, such as enable_thinking=false")
        try:
            values[name] = parse_json(value)
        except ValueError:
            values[name] = value
    return values


def _say(text: str) -> None:
    """Write to the terminal, which must not obey what a model says; whoever reads a pipe gets the text as it is."""
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def body(values: flags.FlagValues) -> None:
    check_outputs(save_state=values.save_state)
    chat = Chat(values, _say)
    if values.load_state:
        chat.load(shlex.quote(values.load_state))
    print(chat.describe(), file=sys.stderr)
    with ending_signals():
        try:
            converse(chat, sys.stdin.isatty())
        finally:  # whatever ended it: what was said cannot be said again
            if values.save_state and chat.session.is_finite:  # where it is not, that has been said
                with undisturbed():
                    chat.save(shlex.quote(values.save_state))


def converse(chat: Chat, person: bool) -> None:
    """Read lines and answer them, until the user leaves or a script ends."""
    if person:
        import readline  # noqa: F401  (its import makes input() editable)

        print("/help lists the commands", file=sys.stderr)
    leaving = False
    while True:
        try:
            text = read_turn("> ", person)
            leaving = False
            chat.line(text)
        except (EOFError, Quit):
            return
        except KeyboardInterrupt:
            if leaving or not person:
                return
            leaving = True
            print("\nagain, or Ctrl-D, to leave", file=sys.stderr)
        except (ValueError, OSError) as error:
            complain(error)
            if not person or isinstance(error, BrokenPipeError):
                raise Stopped(1) from error


def main(argv: list[str] | None = None) -> int:
    return run_command(__doc__, [define], body, argv)
