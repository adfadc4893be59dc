"""What the strings of an exported program may say, since torch evaluates, resolves or compiles them.

``sympy.sympify`` evaluates size expressions; guards and names become Python source that ``torch.fx`` executes; targets
are looked up attribute by attribute; tree specs may name a module to import. Each has a closed grammar here.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable
from typing import Any, TypeGuard

import torch

MAX_TEXT = 4000
MAX_NODES = 1000
MAX_EXPONENT = 16
MAX_INTEGER = 2**63
SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,6}")
DOTTED_NAME = re.compile(r"[A-Za-z0-9_][\w\-]*(\.[A-Za-z0-9_][\w\-]*)*", re.ASCII)
# No quote, backslash, hash or line break: nothing that could end the expression in the source that torch writes.
GUARD_TEXT = re.compile(r"[\w \[\]().,'<>=!+\-*/%&|~]+", re.ASCII)
ATEN_TARGET = re.compile(r"torch\.ops\.(aten|quantized_decomposed)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
OPERATORS = "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem"
SIZE_OPERATORS = "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt sym_sum"
OTHER_TARGETS = frozenset(
    [f"_operator.{name}" for name in OPERATORS.split()]
    + [f"torch.{name}" for name in SIZE_OPERATORS.split()]
    + ["math.trunc", "torch._sym_sqrt"]
    + [f"torch.ops.higher_order.wrap_with_{name}" for name in ("set_grad_enabled", "autocast")]
)
# srepr's constructors, then torch.utils._sympy.functions; powers and shifts are bounded apart.
FUNCTIONS = (
    "Add Mul Integer Rational Float Max Min Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan "
    "StrictGreaterThan GreaterThan And Or Not Abs floor ceiling Piecewise ExprCondPair Tuple "
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv "
    "IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity"
)
EXPRESSION_FUNCTIONS = frozenset(FUNCTIONS.split())
POWERS = frozenset(["Pow", "PowByNatural", "FloatPow", "LShift", "RShift"])
EXPRESSION_NAMES = frozenset(["true", "false", "oo", "int_oo"])
GUARD_FUNCTIONS = frozenset(
    [
        "min",
        "max",
        "abs",
        "int",
        "float",
        "bool",
        "math.trunc",
        "math.floor",
        "math.ceil",
        "math.isnan",
        "torch.sym_float",
    ]
)
GUARD_METHODS = frozenset(["size", "stride", "storage_offset", "dim", "numel"])
GUARD_NAMES = frozenset(["inf", "math.inf"])
TREE_TYPES = frozenset(["builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"])
ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
UNBOUNDED = (ast.Pow, ast.LShift, ast.RShift, ast.MatMult)


def is_identifier(name: object) -> bool:
    """A name that generated Python source can hold."""
    return isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def is_dotted_name(name: object) -> bool:
    """A parameter's or module's path, such as ``layer1.0.weight``."""
    return isinstance(name, str) and DOTTED_NAME.fullmatch(name) is not None


def is_expression(text: object) -> bool:
    """A size expression of integers, symbols such as ``s0``, arithmetic and the listed functions."""
    return isinstance(text, str) and _all_nodes(text, _is_expression_node)


def is_guard(text: object) -> bool:
    """A condition on input sizes, such as ``L['x'].size()[0] % 2 == 0``."""
    return isinstance(text, str) and GUARD_TEXT.fullmatch(text) is not None and _all_nodes(text, _is_guard_node)


def is_target(target: object) -> bool:
    """An operator that computes on tensors or sizes; none that reads or writes files."""
    if not isinstance(target, str):
        return False
    found = ATEN_TARGET.fullmatch(target)
    if found is None or found[1] == "quantized_decomposed":
        return found is not None or target in OTHER_TARGETS
    overload = "" if found[3] == "default" else found[3]
    # TorchScript registers more under aten, such as save, which the dispatcher does not know.
    if not torch._C._dispatch_has_kernel(f"aten::{found[2]}{'.' * bool(overload)}{overload}"):
        return False
    schema = torch._C._get_schema(f"aten::{found[2]}", overload)
    return not any(argument.name == "filename" for argument in schema.arguments)


def is_tree_spec(text: object, *, is_key: Callable[[object], bool]) -> bool:
    """The structure of inputs or outputs: tuples, lists and dicts, whose keys pass ``is_key``."""
    try:
        protocol, spec = json.loads(text) if isinstance(text, str) and len(text) < 10**6 else (None, None)
        return protocol == 1 and _is_tree(spec, is_key)
    except (ValueError, TypeError, RecursionError):
        return False


def _is_tree(spec: Any, is_key: Callable[[object], bool]) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"type", "context", "children_spec"}:
        return False
    children = spec["children_spec"]
    if not isinstance(children, list) or not all(_is_tree(child, is_key) for child in children):
        return False
    if spec["type"] is None:
        return spec["context"] is None and not children
    if spec["type"] not in TREE_TYPES or not isinstance(spec["context"], str):
        return False
    context = json.loads(spec["context"])
    return context is None or (isinstance(context, list) and all(is_key(key) for key in context))


def _all_nodes(text: str, is_allowed: Callable[[ast.AST], bool]) -> bool:
    if len(text) > MAX_TEXT or "\n" in text:
        return False
    try:
        tree = ast.parse(text, mode="eval")
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    # A string or a tuple of sizes times a large number fills the memory: each only where it is used up at once.
    used = {id(child) for node in nodes if isinstance(node, ast.Subscript) for child in (node.value, node.slice)}
    used |= {id(node.args[0]) for node in nodes if _holds_string(node)}
    return len(nodes) <= MAX_NODES and all(
        (isinstance(node, ARITHMETIC) and not isinstance(node, UNBOUNDED))
        or (is_allowed(node) and (id(node) in used or not _repeats(node)))
        for node in nodes
    )


def _holds_string(node: ast.AST) -> TypeGuard[ast.Call]:
    match node:
        case ast.Call(func=ast.Name(id="Symbol" | "Float"), args=[ast.Constant()]):
            return True
    return False


def _repeats(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str()) | ast.Call(func=ast.Attribute(attr="size" | "stride")):
            return True
    return False


def _is_expression_node(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=bool() | float()):
            return True
        case ast.Constant(value=int() as value):
            return abs(value) < MAX_INTEGER
        case ast.Constant(value=str() as name):
            # Only Symbol('s0') and Float('0.5') hold strings; both are bounded by the same pattern.
            return re.fullmatch(r"(s|u|zf|zuf)\d{1,6}|[\d.]{1,40}", name) is not None
        case ast.Name(id=name):
            return name in EXPRESSION_FUNCTIONS | POWERS | EXPRESSION_NAMES | {"Symbol"} or bool(SYMBOL.fullmatch(name))
        case ast.keyword(arg="positive" | "integer" | "nonnegative" | "real" | "precision", value=ast.Constant()):
            return True
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)]):
            return SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id=name), args=[base, exponent], keywords=[]) if name in POWERS:
            return _is_small_power(base, exponent)
        case ast.Call(func=ast.Name(id="Float"), args=[_]):
            return True
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in EXPRESSION_FUNCTIONS
    return False


def _is_small_power(base: ast.expr, exponent: ast.expr) -> bool:
    """A power of something without powers inside, by a small integer: no tower of powers fills the memory."""
    match exponent:
        case ast.Call(func=ast.Name(id="Integer"), args=[value]):
            exponent = value
    inner = {node.id for node in ast.walk(base) if isinstance(node, ast.Name)}
    try:
        value = ast.literal_eval(exponent)
    except (ValueError, TypeError, SyntaxError):
        return False
    return not inner & POWERS and type(value) is int and abs(value) <= MAX_EXPONENT


def _is_guard_node(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=bool() | float()):
            return True
        case ast.Constant(value=int() as value):
            return abs(value) < MAX_INTEGER
        case ast.Constant(value=str() as name):
            return is_identifier(name)
        case ast.Name(id=name):
            return name in {"L", "inf", "math", "torch"} or name in GUARD_FUNCTIONS
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in ("math", "torch"):
            return f"{module}.{name}" in GUARD_FUNCTIONS | GUARD_NAMES
        case ast.Attribute(value=ast.Subscript(), attr=name):
            return name in GUARD_METHODS
        case ast.Subscript(slice=ast.Constant()):
            return True
        case ast.Call(func=ast.Attribute(attr=name), args=[], keywords=[]):
            return name in GUARD_METHODS
        case ast.Call(func=function, keywords=[]):
            return ast.unparse(function) in GUARD_FUNCTIONS
    return False
