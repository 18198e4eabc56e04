"""The fixed list of operators: each is one mistake that a method could hold, applied at one place of its source.

An operator visits the syntax tree of a module and finds the places where its mistake can be made. Asked for one of
them, it makes the mistake there and nowhere else. Never visited: annotations, decorators, imports, what is raised,
asserted or warned of: a mistake there changes no number.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from typing import ClassVar, TypeVar

# fmt: off
_REDUCTIONS = frozenset({
    "all", "any", "argmax", "argmin", "argsort", "concatenate", "cumsum", "diff", "expand_dims", "max", "mean",
    "median", "min", "nanmax", "nanmean", "nanstd", "nansum", "norm", "partition", "prod", "quantile", "repeat",
    "roll", "sort", "stack", "std", "sum", "take", "var",
})
# fmt: on
_Node = TypeVar("_Node", bound=ast.AST)
_LIBRARIES = frozenset({"np", "torch", "scipy", "math", "stats", "linalg", "fft"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operator applies.

    Attributes:
        function: the innermost function around it; "" outside of all.
        line: its number in the source.
        change: the expression before and after.
    """

    function: str
    line: int
    change: str


class Operator(ast.NodeTransformer):
    """Makes one kind of mistake at the place `wanted`, counted in the order of the source; None: nowhere.

    Attributes:
        name: the column of the table.
        says: the mistake in words.
        places: after a visit, where the operator applies.
    """

    name = ""
    says = ""

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted = wanted
        self.places: list[Place] = []
        self._functions: list[str] = []
        self._parents: list[ast.AST] = []

    def changed(self, node: ast.AST) -> ast.AST | None:
        """The node with the mistake, as a new node; None where the operator does not apply."""
        raise NotImplementedError

    @property
    def parent(self) -> ast.AST:
        """What the node that is visited belongs to."""
        return self._parents[-1]

    def visit(self, node: ast.AST) -> ast.AST:
        """Visit a node and what belongs to it, in the order of the source."""
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)) or _warns(node):
            return node
        made = self.changed(node) if self._parents else None
        if made is not None:
            function = self._functions[-1] if self._functions else ""
            change = f"{_text(node)} -> {_text(made)}"
            self.places.append(Place(function, getattr(node, "lineno", 0), change))
            if len(self.places) - 1 == self.wanted:
                return ast.copy_location(made, node)
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if named:
            self._functions.append(node.name)
        self._parents.append(node)
        self._visit_parts(node)
        self._parents.pop()
        if named:
            self._functions.pop()
        return node

    def _visit_parts(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if isinstance(value, list):
                value[:] = [self.visit(each) if isinstance(each, ast.AST) else each for each in value]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))


class Sign(Operator):
    """Plus for minus, a minus too few, smaller for larger."""

    name = "sign"
    says = "plus and minus swapped, a minus dropped, larger and smaller swapped, argmax and argmin swapped"
    _swaps: ClassVar = {
        ast.Lt: ast.Gt,
        ast.Gt: ast.Lt,
        ast.LtE: ast.GtE,
        ast.GtE: ast.LtE,
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
    }
    _names: ClassVar = {"argmax": "argmin", "argmin": "argmax"}

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return None if isinstance(node.operand, ast.Constant) else copy.deepcopy(node.operand)
        if isinstance(node, ast.Attribute) and node.attr in self._names:
            return _with(node, attr=self._names[node.attr])
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in self._swaps:
            return _with(node, ops=[self._swaps[type(node.ops[0])]()])
        if isinstance(node, ast.BinOp) and type(node.op) in self._swaps:
            return None if _listed(node.left) or _listed(node.right) else _with(node, op=self._swaps[type(node.op)]())
        if isinstance(node, ast.AugAssign) and type(node.op) in self._swaps:
            return None if _listed(node.value) else _with(node, op=self._swaps[type(node.op)]())
        return None


class LabelShift(Operator):
    """The label of the neighbour."""

    name = "label shift"
    says = "every example gets the label of the one before it, or every category the name or place of the one before it"

    def changed(self, node: ast.AST) -> ast.AST | None:
        if not isinstance(node, (ast.Name, ast.Attribute)) or not isinstance(node.ctx, ast.Load) or self._unmoved():
            return None
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name == "codes":
            return _expression(f"np.roll({_text(node)}, 1)")
        if isinstance(node, ast.Attribute) and name in ("scored", "categories"):
            return _expression(f"({_text(node)}[-1:] + {_text(node)}[:-1])")
        return None

    def _unmoved(self) -> bool:
        """Whether only the number of labels is asked for, or a method of them called."""
        if isinstance(self.parent, ast.Compare):
            return any(isinstance(each, (ast.Is, ast.IsNot)) for each in self.parent.ops)
        if isinstance(self.parent, ast.Call):
            return isinstance(self.parent.func, ast.Name) and self.parent.func.id == "len"
        return isinstance(self.parent, ast.Attribute)


class PositionOffByOne(Operator):
    """One place further."""

    name = "position off by one"
    says = "an index, the bound of a slice or the start of a range moved by one"

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Slice) and (node.lower or node.upper):
            bound = "upper" if node.upper else "lower"
            return _with(node, **{bound: _next(getattr(node, bound))})
        if isinstance(node, ast.Subscript) and isinstance(_whole(node.slice), int) and not _is_shape(node):
            return _with(node, slice=_next(node.slice))
        if isinstance(node, ast.Call) and _called(node) in ("range", "arange") and not self._counts_only():
            if len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
                return _with(node, args=[ast.Constant(1), _next(node.args[0])])
            if len(node.args) >= 2:
                return _with(node, args=[_next(node.args[0]), _next(node.args[1]), *node.args[2:]])
        return None

    def _counts_only(self) -> bool:
        """`for _ in range(n)`: only how often matters, which stays the same."""
        target = getattr(self.parent, "target", None)
        return isinstance(target, ast.Name) and target.id == "_"


class PaddingCounted(Operator):
    """What does not count is counted."""

    name = "padding counted"
    says = "what is masked, missing (NaN) or not finite is taken for a value that counts"
    _masks = frozenset({"there", "mask", "counted"})

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Name) and node.id in self._masks and isinstance(node.ctx, ast.Load):
            return _expression(f"({node.id} | True)")
        if not isinstance(node, ast.Call):
            return None
        name = _called(node)
        if name == "isnan":
            return _expression(f"({_text(node)} & False)")
        if name == "isfinite":
            return _expression(f"({_text(node)} | True)")
        if name == "nan_to_num":
            return copy.deepcopy(node.args[0])
        if name.startswith("nan") and name[3:] in _REDUCTIONS and isinstance(node.func, ast.Attribute):
            return _with(node, func=_with(node.func, attr=name[3:]))
        return None


class WrongAxis(Operator):
    """Rows for columns."""

    name = "wrong axis"
    says = "the first axis for another one and the other way round; a transpose left out; an axis added elsewhere"

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Attribute) and node.attr == "T" and isinstance(node.ctx, ast.Load):
            return copy.deepcopy(node.value)
        if isinstance(node, ast.Subscript):
            if _is_shape(node) and _whole(node.slice) in (0, 1, -1):
                return _with(node, slice=ast.Constant(int(_whole(node.slice) == 0)))
            if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2 and _adds_axis(node.slice):
                return _with(node, slice=_with(node.slice, elts=node.slice.elts[::-1]))
        if isinstance(node, ast.Call) and _called(node) in _REDUCTIONS and isinstance(node.func, ast.Attribute):
            return self._of_call(node, node.func)
        return None

    def _of_call(self, node: ast.Call, func: ast.Attribute) -> ast.AST | None:
        for place, keyword in enumerate(node.keywords):
            if keyword.arg in ("axis", "dim") and _whole(keyword.value) is not None:
                keywords = list(node.keywords)
                keywords[place] = _with(keyword, value=_other_axis(keyword.value))
                return _with(node, keywords=keywords)
        place = 1 if _is_library(func.value) else 0
        if len(node.args) != place + 1 or _whole(node.args[place]) is None:
            return None
        return _with(node, args=[*node.args[:place], _other_axis(node.args[place])])


class LayerPlusOne(Operator):
    """The layer above."""

    name = "layer + 1"
    says = "the layer above is taken for the one that is meant"

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Attribute) and node.attr == "layer" and isinstance(node.ctx, ast.Load):
            return _expression(f"({_text(node)} + 1)")
        return None


class _Swapped(Operator):
    """One name for another and the other way round, as an attribute or as a text."""

    pair = ("", "")

    def changed(self, node: ast.AST) -> ast.AST | None:
        one, two = self.pair
        other = {one: two, two: one}
        if isinstance(node, ast.Attribute) and node.attr in other:
            return _with(node, attr=other[node.attr])
        if isinstance(node, ast.Constant) and node.value in other:
            return _with(node, value=other[node.value])
        return None


class GateUpSwapped(_Swapped):
    """The gate for what it multiplies."""

    name = "gate and up swapped"
    says = "the gate of an MLP is taken for what it multiplies, and the other way round"
    pair = ("gate", "up")


class WeightsSwapped(_Swapped):
    """What a neuron reads for what it writes."""

    name = "input and output weights swapped"
    says = "what a neuron reads is taken for what it writes, and the other way round"
    pair = ("input_weights", "output_weights")


class MeanForSum(Operator):
    """A sum that should be a mean."""

    name = "mean for sum"
    says = "a mean is a sum, and a sum a mean"
    _names: ClassVar = {"mean": "sum", "sum": "mean", "nanmean": "nansum", "nansum": "nanmean"}

    def changed(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in self._names:
            return _with(node, func=_with(node.func, attr=self._names[node.func.attr]))
        return None


class LogBase(Operator):
    """Bits for nats."""

    name = "log base"
    says = "a logarithm or an exponential to base 2 where it is natural, and the other way round"
    _names: ClassVar = {"log": "log2", "log2": "log", "log10": "log", "exp": "exp2", "exp2": "exp"}
    _names |= {"logaddexp": "logaddexp2", "logsumexp": "", "log1p": "", "expm1": "", "log_softmax": ""}

    def changed(self, node: ast.AST) -> ast.AST | None:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return None
        if node.func.attr not in self._names:
            return None
        other = self._names[node.func.attr]
        # Where there is no function of the other base, the logarithm of 2 divides.
        return _with(node, func=_with(node.func, attr=other)) if other else _expression(f"({_text(node)} / 0.6931)")


OPERATORS: tuple[type[Operator], ...] = (
    Sign,
    LabelShift,
    PositionOffByOne,
    PaddingCounted,
    WrongAxis,
    LayerPlusOne,
    GateUpSwapped,
    WeightsSwapped,
    MeanForSum,
    LogBase,
)


def places(operator: type[Operator], source: str) -> list[Place]:
    """Where an operator applies to a source, in the order of the source."""
    found = operator()
    found.visit(ast.parse(source))
    return found.places


def mutated(operator: type[Operator], source: str, place: int) -> str:
    """The source with one mistake; comments are lost."""
    return ast.unparse(ast.fix_missing_locations(operator(place).visit(ast.parse(source))))


# Helpers --------------------------------------------------------------------------------------------


def _with(node: _Node, **parts: object) -> _Node:
    made = copy.deepcopy(node)
    for name, part in parts.items():
        setattr(made, name, copy.deepcopy(part))
    return made


def _text(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node)))


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _next(node: ast.expr) -> ast.expr:
    whole = _whole(node)
    return _expression(f"{_text(node)} + 1") if whole is None else _expression(str(whole + 1))


def _whole(node: ast.AST) -> int | None:
    """The whole number that is written here."""
    try:
        found = ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError):
        return None
    return found if type(found) is int else None


def _other_axis(node: ast.expr) -> ast.expr:
    return ast.Constant(int(_whole(node) == 0))


def _is_shape(node: ast.Subscript) -> bool:
    return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"


def _adds_axis(index: ast.Tuple) -> bool:
    """`[:, None]` or `[None, :]`."""
    return {ast.unparse(each) for each in index.elts} == {":", "None"}


def _is_library(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in _LIBRARIES


def _called(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    func = node.func
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def _warns(node: ast.AST) -> bool:
    called = node.value if isinstance(node, ast.Expr) else node
    return isinstance(called, ast.Call) and _called(called) in ("warn", "print")


def _listed(node: ast.expr) -> bool:
    """Whether this is a text or a list, which can only be added."""
    kinds = (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr)
    return isinstance(node, kinds) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
