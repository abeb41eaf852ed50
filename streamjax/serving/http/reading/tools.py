"""Tools: what a request offers, how the model is told, and its calls, found in the text it writes.

A call is written as many models were tuned to write it (Hermes, Qwen): `<tool_call>`, a line of JSON with `name` and
`arguments`, `</tool_call>`. Templates that have this form are given the tools; for all others the system's message
describes them. Either way the form, and each tool's schema, are held by a constraint.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from llguidance import StructTag

from streamjax.serving.http.reading.constraints import Grammars, TokenConstraint, grammar_of_schema
from streamjax.serving.http.reading.fields import Fields, wrong_type, wrong_value
from streamjax.serving.http.reading.messages import Messages, as_text

_BEGIN, _END = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST = 128
_ABOUT = """\
You may call these functions. Their signatures:
<tools>
{tools}
</tools>
For each call, write its name and arguments as JSON between tags:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    offered: as they came. choice: none, auto, required, or the name of the one that must be called. several: whether
    there may be several calls where there must be one; it has to be asked for, since small models find no end.
    """

    offered: tuple[dict[str, Any], ...] = ()
    choice: str = "none"
    several: bool = False

    @property
    def are_called(self) -> bool:
        """Whether the answer may hold calls."""
        return bool(self.offered) and self.choice != "none"

    def constraint(self, grammars: Grammars) -> TokenConstraint | None:
        """What holds the calls to their form."""
        if not self.are_called:
            return None
        return grammars.grammar(self._free() if self.choice == "auto" else self._forced(), "tools")

    def _free(self) -> str:
        tags = [
            StructTag(trigger=_BEGIN, begin=f"{_BEGIN}\n{_head(tool)}", grammar=_schema(tool), end=f"}}\n{_END}")
            for tool in self.offered
        ]
        return StructTag.to_grammar(tags, assume_special=False)

    def _forced(self) -> str:
        tools = [tool for tool in self.offered if self.choice in ("required", tool["function"]["name"])]
        several = ' ("\\n" call)*' if self.several and self.choice == "required" else ""
        bodies = " | ".join(f"body_{i}" for i in range(len(tools)))
        lines = ["%llguidance {}", f"start: call{several}", f"call: {_quoted(_BEGIN)} {_NEWLINE} ({bodies}) {_CLOSE}"]
        lines += [f"body_{i}: {_quoted(_head(tool))} %json {json.dumps(_schema(tool))}" for i, tool in enumerate(tools)]
        return "\n".join(lines)

    def told(self, messages: Messages, template: str | None) -> tuple[Messages, dict[str, Any]]:
        """Messages that tell the model of the tools, and what its template is given besides."""
        if template is not None and "tools" in template and _BEGIN in template:
            return messages, {"tools": list(self.offered)} if self.offered else {}
        messages = as_text(messages)
        if not self.offered:
            return messages, {}
        about = _ABOUT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.offered))
        if messages and messages[0]["role"] == "system":
            first = {"role": "system", "content": f"{messages[0]['content']}\n\n{about}"}
            return [first, *messages[1:]], {}
        return [{"role": "system", "content": about}, *messages], {}


def read_tools(fields: Fields) -> Tools:
    """Take `tools`, `tool_choice` and `parallel_tool_calls`.

    Raises:
      ApiError: 400, names the field.
    """
    for name in ("functions", "function_call"):
        fields.refuse(name, "use tools and tool_choice", [])
    given = fields.take("tools", list, default=[])
    if len(given) > _MOST:
        raise wrong_value("tools", f"has {len(given)} tools: {_MOST} are the most")
    offered = tuple(_tool(Fields(tool, f"tools[{i}].")) for i, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise wrong_value("tools", "must have a name for each tool that no other has")
    several = fields.take("parallel_tool_calls", bool, default=False)
    choice = fields.take("tool_choice", str, dict, default="auto" if offered else "none")
    if isinstance(choice, dict):
        about = Fields(choice, "tool_choice.")
        about.one_of("type", ("function",))
        choice = Fields(about.required("function", dict), "tool_choice.function.").required("name", str)
        if choice not in names:
            raise wrong_value("tool_choice", f"must name one of the tools, and names {choice[:64]!r}")
    elif choice not in ("none", "auto", "required"):
        raise wrong_value("tool_choice", f"must be none, auto, required or a function, and is {choice[:64]!r}")
    if choice != "none" and not offered:
        raise wrong_value("tool_choice", "is only allowed with tools")
    return Tools(offered, choice, several)


def _tool(tool: Fields) -> dict[str, Any]:
    tool.one_of("type", ("function",))
    function = Fields(tool.required("function", dict), tool.path("function."))
    name = function.required("name", str)
    if not _NAME.fullmatch(name) or name in ("none", "auto", "required"):
        raise wrong_value(function.path("name"), "must be 1 to 64 letters, digits, - and _, and none of the choices")
    about: dict[str, Any] = {
        "name": name,
        "description": function.take("description", str, default=""),
        "parameters": function.take("parameters", dict, default={"type": "object", "properties": {}}),
    }
    if function.take("strict", bool, default=False):
        about["strict"] = True
    function.finish()
    tool.finish()
    grammar_of_schema(about["parameters"], function.path("parameters"))
    return {"type": "function", "function": about}


def _quoted(text: str) -> str:
    return json.dumps(text)


_NEWLINE, _CLOSE = _quoted("\n"), _quoted("}\n" + _END)


def _head(tool: dict[str, Any]) -> str:
    return f'{{"name": "{tool["function"]["name"]}", "arguments": '


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments; what llguidance does not know of it is held only where the tool is strict."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    lenient = not tool["function"].get("strict", False)
    return {**tool["function"]["parameters"], "x-guidance": {**style, "lenient": lenient}}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that the model has written; its arguments are JSON, as text."""

    name: str
    arguments: str


class CallParser:
    """Tells calls from text, in pieces as they come."""

    def __init__(self) -> None:
        self._held = ""  # may be the beginning of a call, or is one
        self._searched = 0  # characters of it in which no end of a call is

    def push(self, text: str) -> list[str | Call]:
        """Text and calls that are certain after this piece."""
        self._held += text
        found: list[str | Call] = []
        while self._held:
            if not self._held.startswith(_BEGIN):
                at = self._held.find(_BEGIN)
                certain = at if at >= 0 else len(self._held) - _overlap(self._held)
                if certain:
                    found.append(self._held[:certain])
                    self._held = self._held[certain:]
                if at < 0:
                    break
            at = self._held.find(_END, self._searched)
            if at < 0:
                self._searched = max(len(self._held) - len(_END), 0)
                break
            call = _parse(self._held[len(_BEGIN) : at])
            if call is None:  # the tag stands within a string of the arguments
                self._searched = at + 1
                continue
            found.append(call)
            self._held, self._searched = self._held[at + len(_END) :], 0
        return found

    def finish(self) -> str:
        """What was held back: a call that was cut short, as text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def is_call(rest: str) -> bool:
        """Whether what `finish` gave is a call that was cut short."""
        return rest.startswith(_BEGIN)


def _overlap(text: str) -> int:
    """Length of the longest end of a text that begins a call."""
    return next((n for n in range(min(len(_BEGIN) - 1, len(text)), 0, -1) if _BEGIN.startswith(text[-n:])), 0)


def _parse(text: str) -> Call | None:
    try:
        value = json.loads(text)
        return Call(value["name"], json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def require_no_form(tools: Tools, constraint: TokenConstraint | None) -> None:
    """Refuse calls of tools beside an answer in another form."""
    if tools.are_called and constraint is not None:
        raise wrong_type("response_format", "text where tools may be called", {})
