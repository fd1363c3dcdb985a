"""A function of a random key that makes many arrays, compiled array by array.

An initialisation is hundreds of small random programs in one: XLA compiles each again, one after
the other, although most differ in nothing but a number. 866M's took a GPU minutes. Here each array
gets the part of the traced function that it needs, and parts of one form, whose numbers are their
arguments, are compiled once, several forms at a time. The values are those of the function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
from jax.extend import core

from ldm_scaling.parallel import hosts

# What calls a function: its equations are taken in its place.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint",
    "remat2",
})


def run(function: Callable[[jax.Array], Any], key: jax.Array, shardings: Any = None) -> Any:
    """`function(key)`, a pytree of arrays.

    Args:
      function: pure, of a key alone; what does not reach its results costs its tracing only.
      key: a JAX random key.
      shardings: of the results, a pytree like theirs; the default device if None.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(key)
    leaves, treedef = jax.tree.flatten(shapes)
    where = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    graph = _Graph(closed)
    parts = [graph.part(out) for out in graph.outputs]
    forms = {}
    for part, sharding in zip(parts, where):
        forms.setdefault((part.form, sharding), (part, sharding))
    # Several processes compile in one order, for their compilers may wait for one another.
    with futures.ThreadPoolExecutor(1 if jax.process_count() > 1 else os.cpu_count()) as pool:
        compiled = dict(zip(forms, pool.map(lambda one: _compile(*one, key), forms.values())))
    out = [
        compiled[part.form, sharding](key, *part.numbers) for part, sharding in zip(parts, where)
    ]
    return jax.tree.unflatten(treedef, out)


def _compile(part: _Part, sharding: Any, key: jax.Array) -> Callable:
    function = jax.jit(
        part, out_shardings=sharding, compiler_options=hosts.run_once_options()
    )
    return function.lower(key, *part.numbers).compile()


class _Part:
    """The equations that one result needs.

    Args:
      equations: in order, as (primitive, parameters, operands, results), each operand or result a
        number of its own; operands that are not results are the key, 0, or a number that is given.
      wanted: the result.
      numbers: those given, by operand.
    """

    def __init__(self, equations: Sequence[tuple], wanted: int, numbers: dict[int, Any]):
        self._equations, self._wanted, self._given = equations, wanted, tuple(numbers)
        self.numbers = tuple(numbers.values())
        # Parts of one form are one program. A text does not tell the constants of functions.
        self.form = (
            tuple((p.name, repr(sorted(q.items(), key=str)), *map(id, _constants(q)), i, o)
                  for p, q, i, o in equations),
            wanted, self._given, tuple((jax.numpy.shape(n), str(n.dtype)) for n in self.numbers),
        )

    def __call__(self, key: jax.Array, *numbers: Any) -> jax.Array:
        values = {0: key, **dict(zip(self._given, numbers))}
        for primitive, parameters, operands, results in self._equations:
            found = primitive.bind(*(values[i] for i in operands), **parameters)
            values.update(zip(results, found if primitive.multiple_results else [found]))
        return values[self._wanted]


def _constants(parameters: Any) -> Iterator[Any]:
    """What the functions among an equation's parameters hold, and those within them."""
    for value in jax.tree.leaves(parameters, is_leaf=_is_function):
        if isinstance(value, core.ClosedJaxpr):
            yield from value.consts
            value = value.jaxpr
        if isinstance(value, core.Jaxpr):
            for equation in value.eqns:
                yield from _constants(equation.params)


def _is_function(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


class _Graph:
    """A traced function's equations, those of functions that it calls in their place.

    Args:
      closed: with one argument.
    """

    def __init__(self, closed: core.ClosedJaxpr):
        self._made: dict[int, tuple] = {}  # By result: its equation.
        self._constants: dict[int, Any] = {}
        self._next = 1
        (argument,) = closed.jaxpr.invars
        names = {argument: 0}
        self.outputs = self._read(closed, names)

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _operand(self, names: dict, atom: Any) -> int:
        if isinstance(atom, core.Literal):
            number = self._new()
            self._constants[number] = jax.numpy.asarray(atom.val, atom.aval.dtype)
            return number
        return names[atom]

    def _read(self, closed: core.ClosedJaxpr, names: dict) -> list[int]:
        for variable, value in zip(closed.jaxpr.constvars, closed.consts):
            names[variable] = self._new()
            self._constants[names[variable]] = value
        for equation in closed.jaxpr.eqns:
            operands = tuple(self._operand(names, atom) for atom in equation.invars)
            called = self._called(equation)
            if called is not None:
                inner = dict(zip(called.jaxpr.invars, operands))
                results = self._read(called, inner)
            else:
                results = tuple(self._new() for _ in equation.outvars)
                one = (equation.primitive, equation.params, operands, results)
                self._made.update(dict.fromkeys(results, one))
            names.update(zip(equation.outvars, results))
        return [self._operand(names, atom) for atom in closed.jaxpr.outvars]

    def _called(self, equation: Any) -> core.ClosedJaxpr | None:
        if equation.primitive.name not in _CALLS:
            return None
        found = next(equation.params[k] for k in _CALLED if k in equation.params)
        return found if isinstance(found, core.ClosedJaxpr) else core.ClosedJaxpr(found, ())

    def part(self, wanted: int) -> _Part:
        """What a result needs, its values numbered in the order of their need."""
        found, order, to_do = {}, [], [wanted]
        while to_do:  # Operands before what needs them; no recursion, for graphs are deep.
            one = to_do[-1]
            equation = self._made.get(one)
            if one in found or equation is None:
                to_do.pop()
                continue
            missing = [i for i in equation[2] if i in self._made and i not in found]
            if missing:
                to_do += missing
                continue
            found.update(dict.fromkeys(equation[3], equation))
            order.append(equation)
            to_do.pop()
        short, numbers = {0: 0}, {}

        def name(i: int) -> int:
            if i not in short:
                short[i] = len(short)
                if i in self._constants:
                    numbers[short[i]] = self._constants[i]
            return short[i]

        equations = tuple(
            (primitive, parameters, tuple(map(name, operands)), tuple(map(name, results)))
            for primitive, parameters, operands, results in order
        )
        return _Part(equations, name(wanted), numbers)
