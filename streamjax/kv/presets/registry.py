"""Named caches: each published system is a function that returns its cascade, registered with its paper."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamjax.field_checks import check_arguments
from streamjax.kv.cache import Cache
from streamjax.kv.codecs.codec import Codec
from streamjax.kv.presets.in_codes import CODECS, in_codes

Built = Cache | tuple[Cache, ...]
Rule = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named cache: what it does in one line, the paper it is from, and the function that builds it.

    `fitted` has, for options whose default does not fit every capacity, the value of the default from all options.
    `grows` names the options by which it grows, where `scales` would name others. `needs`: options that name a file
    without which there is no cache.
    """

    name: str
    summary: str
    paper: str
    build: Callable[..., Built]
    fitted: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    grows: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Option names and their defaults, at the default capacity."""
        return {name: p.default for name, p in inspect.signature(self.build).parameters.items()}

    @property
    def scales(self) -> tuple[str, ...]:
        """Options by which it is made larger or smaller, in proportion to their defaults; what it keeps comes first.

        What it has room for, or else the window; and with `size` also a window that is a good part of the cache.
        """
        if self.grows:
            return self.grows
        usual = self.options
        main = next((option for option in ("capacity", "size", "recent", "window") if option in usual), None)
        if main is None:
            return ()
        shared = main == "size" and usual.get("window", 0) > usual["size"] // 4
        return (main, "window") if shared else (main,)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options: those that are given, and of the others the defaults that fit them."""
        options = {**self.options, **given}
        for name, rule in self.fitted.items():
            if name not in given:
                options[name] = rule(options)
        return options


_PRESETS: dict[str, Preset] = {}


def register(
    paper: str, grows: tuple[str, ...] = (), needs: tuple[str, ...] = (), **fitted: Rule
) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    """Decorator: register a builder under its own name; the first line of its docstring is the summary.

    Args:
      paper: its title and where it is.
      grows: options by which it grows, where they are others than `Preset.scales` finds.
      needs: options that name a file without which there is no cache.
      **fitted: options whose default depends on others, in the order in which they do; see `Preset`.
    """

    def add(build: Callable[..., Built]) -> Callable[..., Built]:
        summary = (inspect.getdoc(build) or "").partition("\n")[0]
        _PRESETS[build.__name__] = Preset(build.__name__, summary, paper, build, fitted, grows, needs)
        return build

    return add


def dividing(option: str, whole: str = "capacity") -> Rule:
    """The default of `option`, or where it does not divide `whole` what does: a part of the default if there is one.

    Nothing tiny: where there is nothing else the default stays, and what needs it to divide refuses it.
    """

    def rule(options: Mapping[str, Any]) -> int:
        usual, total = options[option], options[whole]
        largest = next((size for size in range(min(usual, total), 1, -1) if total % size == 0), 1)
        found = (size for size in (math.gcd(usual, total), largest) if 8 * size >= min(usual, total))
        return next(found, usual)

    return rule


def at_most(option: str, most: Rule) -> Rule:
    """The default of `option`, or `most` where that is less, and 1 at least."""
    return lambda options: max(1, min(options[option], most(options)))


def pages(options: Mapping[str, Any]) -> int:
    """How many pages there are."""
    return options["capacity"] // options["page"] if options["page"] > 0 else 1


def presets() -> dict[str, Preset]:
    """Every named cache, by name."""
    return dict(sorted(_PRESETS.items()))


_MOST = 2**31 - 1  # slots are counted in int32


def parse_preset(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a preset that one word describes, such as "streaming_llm:sinks=4,window=1020".

    Options that are not written are not in the result; values have the type of their option's default.

    Raises:
      ValueError: an unknown name or option, with the nearest known one; a value that is no number.
    """
    name, _, rest = text.partition(":")
    if name not in _PRESETS:
        raise ValueError(f"unknown cache {name!r}; {_nearest(name, _PRESETS)}")
    known = {"codec": "", **_PRESETS[name].options}
    options = {}
    for item in filter(None, rest.split(",")):
        option, equals, value = item.partition("=")
        if option not in known:
            raise ValueError(f"cache {name!r} has no option {option!r}; {_nearest(option, known)}")
        if not equals:
            raise ValueError(f"cache option {item!r} lacks its value: write {option}=NUMBER")
        if option in options:
            raise ValueError(f"cache {name!r}: {option} is given twice")
        options[option] = _value(name, option, value, known[option])
    return name, options


def preset(name: str, **options: Any) -> Built:
    """The cache of a published system: one for all layers, or where layers differ one a layer.

    Args:
      name: one of `presets()`.
      **options: the system's own options, such as `sinks=4, window=1020`. Sizes that are not given fit the capacity:
        `preset("quest", capacity=512)` reads 32 pages, which is all of them, and not 64. Those without a codec of
        their own also take `codec`: "fp8", "int8", "int4", "int2", "hadamard4", "hadamard2", or a codec; see
        `streamjax.kv.presets.in_codes`.

    Raises:
      ValueError: an unknown name or option (the message suggests the nearest), or a value that makes no sense.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown cache preset {name!r}; {_nearest(name, _PRESETS)}")
    known = _PRESETS[name].options
    codec = None if "codec" in known else options.pop("codec", None)
    for option in options:
        if option not in known:
            raise ValueError(f"cache preset {name!r} has no option {option!r}; it takes {', '.join(known)}")
        value = options[option]
        if isinstance(value, int) and abs(value) > _MOST:
            raise ValueError(f"cache {name!r}: {option} is {value}, and {_MOST:,} is the most")
    check_arguments(_PRESETS[name].build, options, f"cache preset {name!r}")
    built = _PRESETS[name].build(**_PRESETS[name].complete(options))
    return built if codec is None else _coded(name, built, codec)


def _coded(name: str, built: Built, codec: Codec | str) -> Built:
    if isinstance(codec, str):
        if codec not in CODECS:
            raise ValueError(f"cache {name!r}: there is no codec {codec!r}; {_nearest(codec, CODECS)}")
        codec = CODECS[codec]
    try:
        return tuple(in_codes(each, codec) for each in built) if isinstance(built, tuple) else in_codes(built, codec)
    except ValueError as error:
        raise ValueError(f"cache {name!r} with a codec: {error}") from None


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def _value(name: str, option: str, value: str, default: object) -> object:
    """A value of the default's type; several numbers are joined by "+"."""
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"cache {name!r}: {option} is true or false, not {value!r}")
        return value.lower() == "true"
    if isinstance(default, str):
        return value
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in value.split("+"))
        return float(value) if isinstance(default, float) else int(value)
    except ValueError:
        raise ValueError(f"cache {name!r}: {option} must be a number, not {value!r}") from None
