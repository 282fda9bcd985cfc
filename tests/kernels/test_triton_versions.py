"""What Triton 3.6 asks of the kernels; the version that the tests run under need not be it."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
PARTS = ("element", "scale", "planes", "plane_shifts", "bf16", "outlier_rest", "outlier_planes")


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_objects_are_passed_on_by_names_of_constants(path):
    """Triton 3.6 takes a part of a constant (`format.element`) as an argument only if a `tl.constexpr` names it."""
    passed = [
        f"{path.name}:{argument.lineno}: {ast.unparse(argument)}"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id != "len"
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(argument, ast.Attribute) and argument.attr in PARTS
    ]
    assert not passed
