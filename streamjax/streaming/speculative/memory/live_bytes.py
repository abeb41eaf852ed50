"""What a program holds at its worst moment, counted from its jaxpr before anything is compiled or allocated.

Compilers fuse and reuse, so this follows two of their rules. What is computed number by number is not stored, unless
something that is stored reads it. And a result takes the place of an operand of its shape that nobody reads any more;
of the arguments those may be taken that are donated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where a call has what it calls
_REPLACE = ("dynamic_update_slice", "while", "scan", "cond", "optimization_barrier")  # may write where an operand lay
# Computed where they are read: number by number, or by an index.
_FUSED = frozenset((
    "abs", "add", "and", "bitcast_convert_type", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy",
    "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "real",
    "rem", "rev", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
    "transpose", "xor",
))  # fmt: skip
# Read where they lie; whoever wants them stored wants what they are of.
_VIEWS = frozenset(("dynamic_slice", "expand_dims", "reshape", "slice", "squeeze"))
_READS = frozenset((
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin", "reduce",
))  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """One operation, whose calls are written out: its operands and results, and what it is besides."""

    name: str
    operands: list[Var]
    results: list[Var]
    params: dict[str, Any]
    kept: bool  # whatever becomes of its results


def live_bytes(function: Callable[..., Any], *args: Any, donated: Sequence[int] = ()) -> int:
    """The most bytes that the results between a function's arguments and its end take at once.

    Args:
      function: a program; what it closes over is not counted, and neither are its arguments.
      args: arrays, or their shapes.
      donated: which arguments' memory may be taken.
    """
    closed = jax.make_jaxpr(function)(*args)
    free = [i in donated for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    return _peak(closed.jaxpr, free)


def _peak(jaxpr: Jaxpr, free: Sequence[bool]) -> int:
    """The peak of a jaxpr, of whose arguments some may be taken."""
    written, outs = _written_out(jaxpr)
    steps = _needed(written, outs)
    last = _last_uses(steps, outs)
    held: dict[Var, int] = {}  # bytes of what is there and was not an argument
    donors = {v for v, may in zip(jaxpr.invars, free, strict=True) if may}  # arguments whose memory may be taken
    ends: dict[int, list[Var]] = {}
    for v, at in last.items():
        ends.setdefault(at, []).append(v)
    now = peak = 0
    for i, (step, fused) in enumerate(steps):
        if fused:
            continue
        dying = ends.get(i, [])
        new, replaces = 0, step.name in _REPLACE or step.name.startswith("scatter") or step.name in _FUSED
        inside = _inside(step)
        for out in step.results:
            taken = [v for v in dying if replaces and (v in held or v in donors) and _same(v, out)]
            held[out] = held.pop(taken[0], 0) if taken else _bytes(out)
            new += 0 if taken else held[out]
            dying = [v for v in dying if not taken or v is not taken[0]]
        peak = max(peak, now + new + inside)
        now += new
        for v in [*dying, *(out for out in step.results if out not in last)]:
            now -= held.pop(v, 0)
    return max(peak, now)


def _written_out(jaxpr: Jaxpr) -> tuple[list[_Step], list[Var]]:
    """The operations of a jaxpr and of those that it calls, in their order, and its results."""
    steps: list[_Step] = []
    names: dict[Var, Any] = {}  # what variables of a call stand for

    def known(found: Sequence[Any]) -> list[Any]:
        return [names.get(v, v) if isinstance(v, Var) else v for v in found]

    def walk(part: Jaxpr) -> None:
        for eqn in part.eqns:
            inner = next((eqn.params[name] for name in _INNER if name in eqn.params), None)
            if eqn.primitive.name in _CALLS and inner is not None:
                called = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                # a jaxpr may be called twice: its variables are named anew
                names.update(zip(called.invars, known(eqn.invars), strict=True))
                walk(called)
                names.update(zip(eqn.outvars, known(called.outvars), strict=True))
                continue
            results = [Var(v.aval) for v in eqn.outvars]
            operands = [v for v in known(eqn.invars) if isinstance(v, Var)]
            names.update(zip(eqn.outvars, results, strict=True))
            steps.append(_Step(eqn.primitive.name, operands, results, eqn.params, bool(eqn.effects)))

    walk(jaxpr)
    return steps, [v for v in known(jaxpr.outvars) if isinstance(v, Var)]


def _needed(steps: Sequence[_Step], outs: Sequence[Var]) -> list[tuple[_Step, bool]]:
    """The operations that results depend on, and which of them are computed where they are read."""
    stored = dict.fromkeys(outs, True)  # of what is needed, whether it has to be stored
    kept = []
    for step in reversed(steps):
        if not step.kept and not any(out in stored for out in step.results):
            continue
        reads = step.name in _FUSED or step.name in _READS
        for v in step.operands:
            through = step.name in _VIEWS and any(stored.get(out, False) for out in step.results)
            stored[v] = stored.get(v, False) or through or not (reads or step.name in _VIEWS)
        fused = reads and not any(stored.get(out, False) for out in step.results)
        kept.append((step, step.name in _VIEWS or (step.name in _FUSED and fused)))
    return kept[::-1]


def _last_uses(steps: Sequence[tuple[_Step, bool]], outs: Sequence[Var]) -> dict[Var, int]:
    """Behind which operation each variable is not read any more; what is computed where it is read counts there."""
    last = dict.fromkeys(outs, len(steps))
    for i in reversed(range(len(steps))):
        step, fused = steps[i]
        until = max((last.get(out, i) for out in step.results), default=i) if fused else i
        for v in step.operands:
            last[v] = max(last.get(v, 0), until)
    return last


def _inside(step: _Step) -> int:
    """The peak within an operation that has jaxprs of its own: of one round of a loop, of the largest branch."""
    params = step.params
    if step.name == "while":
        body = params["body_jaxpr"].jaxpr
        return _peak(body, [i >= params["body_nconsts"] for i in range(len(body.invars))])
    if step.name == "scan":
        body, (consts, carry) = params["jaxpr"].jaxpr, _consts_and_carry(params)
        return _peak(body, [consts <= i < consts + carry for i in range(len(body.invars))])
    if step.name == "cond":
        return max(_peak(branch.jaxpr, [True] * len(branch.jaxpr.invars)) for branch in params["branches"])
    return 0


def _consts_and_carry(scan: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are read by every round, and how many are handed from one to the next."""
    if "num_consts" in scan:
        return scan["num_consts"], scan["num_carry"]
    consts, carry, _ = scan["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def _same(one: Var, other: Var) -> bool:
    a, b = ((getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)) for v in (one, other))
    return a[0] is not None and a == b


def _bytes(v: Var) -> int:
    shape, dtype = getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)
    return 0 if shape is None or dtype is None else math.prod(shape) * getattr(dtype, "itemsize", 8)
