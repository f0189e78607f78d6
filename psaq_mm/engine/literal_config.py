# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The config in a checkpoint, read without running it: MMEngine would execute the text, and a file may come from
anywhere.
"""

import ast
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from psaq_mm.errors import CheckpointError

__all__ = ['config_from_text']


def config_from_text(text: str, source: str) -> Config:
    """A config out of the text that ``Config.pretty_text`` gives: assignments of values.

    Args:
        text: Numbers, strings, None, True, False, lists, tuples, sets and dicts, also as ``dict(key=value)``.
        source: Path of the checkpoint, for messages.

    Returns:
        The config; the modules that its ``custom_imports`` names are imported, as MMEngine does.

    Raises:
        CheckpointError: The text holds anything else, or is cut short; or a module of its ``custom_imports`` is absent.

    Example:
        >>> config_from_text("model = dict(type='DETR', depth=6)", 'student.pth').model.depth
        6
    """
    values = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise ValueError(f'a {type(statement).__name__} in line {statement.lineno}')
            values[statement.targets[0].id] = _value(statement.value)
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(
            f'the config in {source} is no list of plain values ({error}): give config=, the one it was made with'
        ) from error
    imports = values.get('custom_imports') or {}
    try:
        if imports:
            import_modules_from_strings(**imports)
    except ImportError as error:
        raise CheckpointError(
            f'a module that {source} needs is not there ({error}): put its folder on PYTHONPATH'
        ) from error
    return Config(values, format_python_code=False)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        if all(keyword.arg for keyword in node.keywords):
            return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(map(_value, node.elts))
    if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):  # as repr writes the two floats
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    return ast.literal_eval(node)
