"""The calculator."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction

from opd_env.tools.base import tool

_OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str) -> Fraction:
    """The exact value."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPS:
            return Fraction(_OPS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return Fraction(str(node.value))
        raise ValueError("not an arithmetic expression")

    return value(ast.parse(expression.strip(), mode="eval").body)


@tool
def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    value = evaluate(expression)
    return str(value.numerator) if value.denominator == 1 else str(float(value))
