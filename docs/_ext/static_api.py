# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sphinx directive ``public``: the API of a module out of its source, without importing it.

Autodoc imports what it describes. psaq_mm's modules need PyTorch, some of them MMEngine and mmcv, whose compiled
operators cannot be built on Read the Docs; and mocked modules break on arithmetic with constants of torch and hide base
classes. griffe reads the source instead, so the site is the same everywhere and needs neither.
"""

import ast
from pathlib import Path
from typing import Any, Iterator, List, Optional

import griffe
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
INDENT = '   '
logger = logging.getLogger(__name__)


def names(text: Optional[str]) -> List[str]:
    """Names divided by commas or blanks."""
    return (text or '').replace(',', ' ').split()


class Public(SphinxDirective):
    """Describe public names of a module: its ``__all__``, or those of ``:only:``, but for those of ``:without:``.

    ``:shown-as:`` is the module under which users import them, where it is another one.

    A module or name that is not there is a warning, and so is a name without a docstring.
    """

    required_arguments = 1
    option_spec = {'only': directives.unchanged, 'without': directives.unchanged, 'shown-as': directives.unchanged}

    def run(self) -> list:
        """Read the module, write reStructuredText and parse it."""
        path = self.arguments[0]
        module = package(self.env.app)
        for part in path.split('.')[1:]:
            if part not in module.members:
                self.warn(f'there is no module {path}')
                return []
            module = module.members[part]
        self.env.note_dependency(str(module.filepath))
        wanted = names(self.options.get('only')) or public_names(module)
        without = names(self.options.get('without'))
        for name in sorted((set(wanted) | set(without)) - set(module.members)):
            self.warn(f'{path} has no {name}')
        wanted = [name for name in wanted if name in module.members and name not in without]
        shown = self.options.get('shown-as', path)
        lines = [f'.. py:currentmodule:: {shown}', '']
        for name in wanted:
            lines += self.describe(module.members[name], name, f'{shown}.{name}')
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(lines, str(module.filepath)), 0, node)
        return node.children

    def warn(self, message: str) -> None:
        """A warning at the directive: an error in `make docs` and in the tests."""
        logger.warning(message, location=self.get_location())

    # ---------------------------------------------------------------- objects
    def describe(self, found: Any, name: str, shown: str) -> List[str]:
        """Lines of one name of a module."""
        target = found.final_target if found.is_alias else found
        if target.is_class:
            return self.cls(target, name, shown)
        if target.is_function:
            return self.block('function', name + signature(target), self.docstring(target, 'function', shown))
        if target.is_attribute:
            options = [f':type: {target.annotation}'] if target.annotation is not None else []
            return self.block('data', name, self.docstring(target, 'data', shown), options)
        self.warn(f'{shown} is neither a class, a function nor a value')
        return []

    def cls(self, target: griffe.Class, title: str, shown: str) -> List[str]:
        """Lines of a class, its bases, its public methods and its described attributes."""
        body = self.docstring(target, 'class', shown)
        bases = [str(base) for base in target.bases]
        if bases:
            body = [f'Bases: {", ".join(f"``{base}``" for base in bases)}', '', *body]
        for name, member in target.members.items():
            if name.startswith('_') and name != '__call__' or member.is_alias:
                continue
            if member.is_function and member.docstring:
                options = [f':{label}:' for label in ('classmethod', 'staticmethod') if label in member.labels]
                body += self.block('method', name + signature(member), self.docstring(member, 'method', name), options)
            elif member.is_attribute and (text := field_description(member)):
                options = [f':type: {member.annotation}'] if member.annotation is not None else []
                default = default_of(member)
                options += [f':value: {default}'] if default else []
                body += self.block('attribute', name, self.google(text, 'attribute', name), options)
        return self.block('class', title + class_signature(target), body)

    def block(self, kind: str, title: str, body: List[str], options: Optional[List[str]] = None) -> List[str]:
        """Lines of a directive of the Python domain."""
        inner = [*(options or []), '', *body]
        return [f'.. py:{kind}:: {title}', *(INDENT + line if line else '' for line in inner), '']

    def docstring(self, target: Any, kind: str, shown: str) -> List[str]:
        """The docstring of an object as reStructuredText."""
        if not target.docstring:
            self.warn(f'{shown} is public and has no docstring')
            return []
        return self.google(target.docstring.value, kind, shown)

    def google(self, text: str, kind: str, shown: str) -> List[str]:
        """Lines of reStructuredText of a docstring in Google's style."""
        # Of an attribute napoleon takes what stands before a colon for its type, which the source has told.
        what = 'object' if kind in ('attribute', 'data') else kind
        return [*GoogleDocstring(text, self.env.app.config, self.env.app, what, shown).lines(), '']


def package(app: Sphinx) -> Any:
    """psaq_mm as griffe reads it, once a build."""
    if not hasattr(app, '_psaq_mm_source'):
        app._psaq_mm_source = griffe.load('psaq_mm', search_paths=[str(ROOT)], allow_inspection=False)
    return app._psaq_mm_source


def public_names(module: Any) -> List[str]:
    """``__all__``, or the classes and functions that a module without it defines."""
    if module.exports is not None:
        return [str(name) for name in module.exports]
    members = module.members.items()
    return [name for name, member in members if not (member.is_alias or name.startswith('_')) and is_api(member)]


def is_api(member: Any) -> bool:
    """Whether a member of a module is a class or a function."""
    return member.is_class or member.is_function


def signature(function: griffe.Function) -> str:
    """Parameters and return type as they stand in the source; those of a method without ``self``."""
    parameters = list(function.parameters)
    if function.parent is not None and function.parent.is_class and 'staticmethod' not in function.labels:
        parameters = parameters[1:]
    returns = f' -> {function.returns}' if function.returns is not None else ''
    return f'({", ".join(written(parameters))}){returns}'


def written(parameters: list) -> Iterator[str]:
    """Each parameter as in a ``def``, with the markers for keyword-only and positional-only ones."""
    kinds = griffe.ParameterKind
    star = False
    for number, parameter in enumerate(parameters):
        mark = {kinds.var_positional: '*', kinds.var_keyword: '**'}.get(parameter.kind, '')
        if parameter.kind is kinds.keyword_only and not star:
            star = True
            yield '*'
        star = star or parameter.kind is kinds.var_positional
        text = mark + parameter.name
        if parameter.annotation is not None:
            text += f': {parameter.annotation}'
        if parameter.default is not None and not mark:
            text += f' = {parameter.default}'
        yield text
        following = parameters[number + 1].kind if number + 1 < len(parameters) else None
        if parameter.kind is kinds.positional_only and following is not kinds.positional_only:
            yield '/'


def class_signature(target: griffe.Class) -> str:
    """What a class is called with. Groups of settings take their fields, which are described one by one: left out."""
    bases = {str(base).rsplit('.', 1)[-1] for base in target.bases}
    if bases & {'Settings', 'Enum', 'Protocol'}:
        return ''
    if 'NamedTuple' in bases:
        fields = [member for member in target.members.values() if member.is_attribute and member.annotation is not None]
        return f'({", ".join(f"{field.name}: {field.annotation}" for field in fields)})'
    init = target.members.get('__init__')
    return f'({", ".join(written(list(init.parameters)[1:]))})' if init is not None and init.is_function else ''


def setting_call(member: griffe.Attribute) -> Optional[list]:
    """Arguments of ``setting(default, doc)``, the field of a group of settings; None of any other attribute."""
    value = member.value
    if isinstance(value, griffe.ExprCall) and str(value.function) == 'setting':
        return [
            argument.value if isinstance(argument, griffe.ExprKeyword) else argument for argument in value.arguments
        ]
    return None


def field_description(member: griffe.Attribute) -> str:
    """What stands below an attribute, or in its ``setting``; empty where nothing does."""
    call = setting_call(member)
    if call is None:
        return member.docstring.value if member.docstring else ''
    try:
        return str(ast.literal_eval(str(call[1])))
    except ValueError:
        # Put together from names of the code, which only running it tells.
        return 'See the reference of settings.'


def default_of(member: griffe.Attribute) -> str:
    """Source of a setting's default; empty of other attributes, whose values may be long."""
    call = setting_call(member)
    return '' if call is None else str(call[0])


def setup(app: Sphinx) -> dict:
    """Register the directive."""
    app.setup_extension('sphinx.ext.napoleon')
    app.add_directive('public', Public)
    return {'version': '1', 'parallel_read_safe': False}
