# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The base class of runtimes, and the table of all. A new runtime is one class in one file of
:mod:`psaq_mm.runtime.backends`, or in a project's own module.

Which kernels a graph runs with is decided here too: integer ones where they are exact on this processor, see
:mod:`psaq_mm.runtime.kernels`.
"""

import abc
import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import threading
import warnings
from typing import (
    AbstractSet,
    Any,
    ClassVar,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Type,
    TypeVar,
)

import numpy as np

from psaq_mm.errors import ConfigError, nearest
from psaq_mm.runtime.kernels import KERNELS, NARROW, is_exact, make_probe

__all__ = ['RUNTIMES', 'Product', 'Runtime', 'find_runtime', 'register_runtime', 'start', 'starting']

starting = threading.RLock()
"""Held while a session is started, and while the exact kernels of a runtime are searched."""

_warned: Set[Tuple[str, str]] = set()
"""Runtimes and kernels that a warning was given for in this process."""


class Product(NamedTuple):
    """A product in the graph as a runtime executes it.

    Attributes:
        name: As the runtime calls it.
        kind: Its operation.
        how: ``'integer'``, ``'float'``, or ``'fused'`` for an attention in one kernel that does not tell.
        why: Why it is float, where the runtime's class knows.
    """

    name: str
    kind: str
    how: str
    why: str = ''


class Runtime(abc.ABC):
    """A graph in a runtime. A subclass is registered by :func:`register_runtime`.

    Args:
        graph: Content of an ONNX file.
        threads: Of the runtime; None: its own choice.
        way: Kernels to run with, one of :attr:`ways`.
        device: Where it runs, by the runtime's own names; None: the CPU. Given where a user gives it alone, so a
            runtime without such a choice leaves the argument out.
        settings: The runtime's own settings by name, in place of what psaq_mm sets; as ``device``.

    Attributes:
        name: What users give as ``runtime``.
        title: Its name in messages.
        package: The package that it imports.
        minimum: The first version of the package that works, such as ``'2024.4'``; None: any.
        install: How to install that.
        ways: Kernels that it has, the preferred ones first.
        kernels: What the graph runs with, one of :data:`.kernels.KERNELS`.
        input_names: Inputs that the graph has left: a runtime may drop one that nothing reads.

    docs/reference/integer_models.md has an example.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    minimum: ClassVar[Optional[str]] = None
    install: ClassVar[str] = 'pip install psaq_mm[deploy]'
    ways: ClassVar[Tuple[str, ...]] = ('float',)

    kernels: str
    input_names: AbstractSet[str]

    @abc.abstractmethod
    def __init__(
        self,
        graph: bytes,
        threads: Optional[int],
        way: str,
        device: Optional[str] = None,
        settings: Optional[Mapping[str, Any]] = None,
    ): ...

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name. Several threads may call it at once."""

    @contextlib.contextmanager
    def borrowed(self, inputs: Mapping[str, np.ndarray]) -> Iterator[Dict[str, np.ndarray]]:
        """Context manager: all outputs by name, which may lie in the runtime's own memory.

        They are valid, and to be read only, until the context ends. A runtime with one memory for its outputs lets
        other threads wait until then; a run of the same session inside of the context is an error.
        """
        yield self.run(inputs)

    @abc.abstractmethod
    def products(self, graph: bytes) -> List[Product]:
        """The products of the graph as the runtime executes it.

        Args:
            graph: The ONNX file that this was started with.
        """

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str, **place) -> 'Runtime':
        """A session with the kernels that are asked for: one of :data:`.kernels.KERNELS`.

        Args:
            graph: As for the class.
            threads: As for the class.
            kernels: One of :data:`.kernels.KERNELS`.
            place: ``device`` and ``settings`` of the class, where they are given.
        """
        if kernels == 'auto':
            return cls(graph, threads, cls.exact_way(**place), **place)
        return cls(graph, threads, kernels if kernels in cls.ways else cls.ways[0], **place)

    @classmethod
    def installed(cls) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(cls.package) is not None

    @classmethod
    def exact_way(cls, device: Optional[str] = None, settings: Optional[Mapping[str, Any]] = None) -> str:
        """The first of :attr:`ways` that is exact on a device with these settings, searched once in a process.

        Raises:
            ConfigError: None is exact.
        """
        with starting:
            return _find_exact_way(cls, _Place(device, settings))


R = TypeVar('R', bound=Type[Runtime])

RUNTIMES: Dict[str, Type[Runtime]] = {}
"""All runtimes by name."""


def register_runtime(runtime: R) -> R:
    """Class decorator: add a :class:`Runtime` to :data:`RUNTIMES`."""
    RUNTIMES[runtime.name] = runtime
    return runtime


class _Place:
    """A device and settings, as a key: two with the same content are equal.

    Attributes:
        given: ``device`` and ``settings``, those of them that are given.
    """

    def __init__(self, device: Optional[str] = None, settings: Optional[Mapping[str, Any]] = None):
        self.given: Dict[str, Any] = {}
        if device is not None:
            self.given['device'] = device
        if settings:
            self.given['settings'] = dict(settings)
        self._key = repr((device, sorted((settings or {}).items(), key=lambda item: item[0])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=None)
def _find_exact_way(runtime: Type[Runtime], place: _Place) -> str:
    for way in runtime.ways:
        probe = make_probe(NARROW if way == 'weights' else 127)
        if is_exact(runtime(probe.graph, 1, way, **place.given).run, probe):
            return way
    if place.given:
        told = ', '.join(f'{name}={value!r}' for name, value in place.given.items())
        raise ConfigError(
            f'{runtime.title} with {told} multiplies 8-bit codes wrongly, with integer and with float kernels: leave '
            'that out, or force the kernels (kernels=) for a measurement'
        )
    others = ', '.join(repr(name) for name, other in RUNTIMES.items() if other is not runtime)
    raise ConfigError(
        f'{runtime.title} multiplies 8-bit codes wrongly on this processor, with integer and with float kernels: '
        f'choose another runtime, one of {others}'
    )


def find_runtime(
    name: str, kernels: str = 'auto', device: Optional[str] = None, settings: Optional[Mapping[str, Any]] = None
) -> Type[Runtime]:
    """The class of a runtime, whose package can be imported.

    Raises:
        ConfigError: The runtime is not known, not installed, too old, or takes no device or settings; or ``kernels`` is
            none of :data:`.kernels.KERNELS`.
    """
    if kernels not in KERNELS:
        raise ConfigError(f'kernels={kernels!r} is not known: {nearest(kernels, KERNELS)}')
    if name not in RUNTIMES:
        raise ConfigError(f'runtime={name!r} is not known: {nearest(name, RUNTIMES)}')
    runtime = RUNTIMES[name]
    try:
        package = importlib.import_module(runtime.package)
    except ImportError as error:
        others = ', '.join(other for other in RUNTIMES if other != name)
        raise ConfigError(
            f'the runtime {name} is not installed ({error}): {runtime.install}, or choose another one of {others}'
        ) from error
    version = str(getattr(package, '__version__', ''))
    if runtime.minimum and version and _numbers(version) < _numbers(runtime.minimum):
        raise ConfigError(
            f'the runtime {name} is version {version} and psaq_mm needs {runtime.minimum} or a later one: pip install '
            f"--upgrade '{runtime.package}>={runtime.minimum}'"
        )
    taken = inspect.signature(runtime.__init__).parameters
    keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for argument in _Place(device, settings).given:
        if argument not in taken and not keywords:
            raise ConfigError(
                f'the runtime {name} takes no {argument}: leave it out, or choose another one of {", ".join(RUNTIMES)}'
            )
    return runtime


def _numbers(version: str) -> Tuple[int, ...]:
    """The leading numbers of a version: ``'2024.4.1-123'`` is 2024, 4, 1."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match[0].split('.')) if match else ()


def start(
    graph: bytes,
    runtime: str,
    threads: Optional[int] = None,
    kernels: str = 'auto',
    device: Optional[str] = None,
    settings: Optional[Mapping[str, Any]] = None,
) -> Runtime:
    """Start a runtime with a whole ONNX graph.

    Args:
        graph: Content of an ONNX file.
        runtime: Name of the runtime.
        threads: Of the runtime. Defaults to None, its own choice.
        kernels: One of :data:`.kernels.KERNELS`. Any but ``'auto'`` is for measurements: integer kernels may be wrong.
        device: By the runtime's own names. Defaults to None, the CPU.
        settings: The runtime's own settings by name. They take the place of what psaq_mm sets.

    Returns:
        A session; its ``run(inputs)`` takes and returns arrays by name, and several threads may call it.

    Raises:
        ConfigError: The runtime is not known, not installed or too old, has no such device or setting, has no exact
            kernels there, or ``kernels`` is not known.
    """
    found = find_runtime(runtime, kernels, device, settings)
    session = found.begin(graph, threads, kernels, **_Place(device, settings).given)
    if kernels == 'auto':
        _warn_of_slow_kernels(session)
    return session


def _warn_of_slow_kernels(session: Runtime) -> None:
    """Warn once in a process where a graph does not run with the runtime's preferred kernels."""
    key = session.name, session.kernels
    if session.kernels == session.ways[0] or key in _warned:
        return
    _warned.add(key)
    which, advice = 'every product of activations in this model (attention, logits of masks)', ''
    if session.kernels == 'float':
        which = 'this model'
        advice = (
            '. Weights held within 7 bits are exact in integer kernels everywhere: quantize with w_reduce_range=True '
            '(docs/reference/integer_models.md)'
        )
    warnings.warn(
        f"{session.title}'s integer kernels are not exact on this processor (one without VNNI instructions): {which} "
        f'runs in float kernels, with the same answers, slower{advice}',
        stacklevel=3,
    )
