"""What to quantize and to how many bits: frozen dataclasses that are checked when built and convert to plain dicts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterable, Optional, Set, Tuple, Union

from psaq_mm.errors import SpecError, nearest
from psaq_mm.quantization.observers import OBSERVERS
from psaq_mm.quantization.primitives import MAX_BITS, MIN_BITS

SCOPES = ('backbone', 'full')
POINTS = ('gemm', 'linear', 'all')
SOFTMAX_QUANTIZERS = ('affine', 'log2', 'log_sqrt2')
TARGETS = ('default', 'tensorrt')

RECIPES: Dict[str, Dict[str, Any]] = {
    # PSAQ-ViT, arXiv 2203.02250, released code: every edge but the attention weights, weights over the whole code
    # range.
    'psaq_v1': dict(points='all', quantize_softmax=False, w_full_range=True),
    # PSAQ-ViT V2 published no quantizer; as V1 it leaves the attention weights float, and weights are clipped by
    # squared error.
    'psaq_v2': dict(quantize_softmax=False, w_observer='mse'),
    # RepQ-ViT, arXiv 2212.08254, released code: its weights are asymmetric.
    'repq': dict(
        w_symmetric=False,
        w_observer='percentile',
        a_observer='percentile',
        softmax_quantizer='log_sqrt2',
        reparameterize=True,
    ),
}
"""What a method quantizes, and how, by name; bits stand beside it, as in ``'repq_w4a4'``."""

# What a recipe changes where weights have fewer than 8 bits. V2's naive quantizer was published for 8 bits alone. Below
# that a zero point removes a sixth of the divergence from full precision (docs/method.md) at no cost: codes minus their
# zero point fit a signed byte.
FEW_BITS: Dict[str, Dict[str, Any]] = {'psaq_v2': dict(w_symmetric=False)}

_PRESET = re.compile(r'(?:(\w+?)_)?w(\d+)a(\d+)', re.IGNORECASE)


def _check_bits(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        raise SpecError(f'{key}={value!r} is not supported: choose an integer from {MIN_BITS} to {MAX_BITS}.')


def _check_choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise SpecError(f'{key}={value!r} is not known: {nearest(value, allowed)}.')


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SpecError(f'{key}={value!r} is not a truth value: write True or False.')


def _check_keys(what: str, given: Mapping, known: Iterable[str]) -> None:
    known = tuple(known)
    for key in given:
        if key not in known:
            raise SpecError(f'{key!r} is no setting of {what}: {nearest(key, known)}.')


def _without_idle_softmax(chosen: Mapping, settings: Mapping) -> Dict[str, Any]:
    """``chosen`` without its ``softmax_quantizer`` where ``settings`` quantize no attention weights.

    A preset's choice has no effect then, nor has one in an older file: the two were not refused together before.
    """
    idle = settings.get('quantize_softmax') is False or settings.get('points') == 'linear'
    return {key: value for key, value in chosen.items() if not (idle and key == 'softmax_quantizer')}


def _fit_for_target(chosen: Mapping, settings: Mapping) -> Dict[str, Any]:
    """A preset's choice without what the target of ``settings`` does not have; see :attr:`QuantSpec.target`."""
    if settings.get('target') != 'tensorrt':
        return dict(chosen)
    dropped = dict(
        softmax_quantizer=True,
        quantize_softmax=settings.get('points', 'gemm') == 'gemm',
        w_symmetric=settings.get('w_bits') == MAX_BITS,
    )
    return {key: value for key, value in chosen.items() if not dropped.get(key)}


@dataclass(frozen=True)
class Override:
    """Other bits, or none, for the layers whose name matches a pattern.

    Args:
        pattern: Shell-style pattern over dotted module names (``*`` also matches dots), case-sensitive.
        w_bits: Weight bits, None to leave them as they are.
        a_bits: Activation bits, None to leave them as they are.
        float_: Keep the layers in floating point. The key is ``float`` in dicts and JSON.

    Raises:
        SpecError: A value is out of range, or the override would change nothing or contradicts itself.

    Example:
        >>> QuantSpec(w_bits=4, overrides=(Override('*.downsample.reduction', w_bits=8), ))
    """

    pattern: str
    w_bits: Optional[int] = None
    a_bits: Optional[int] = None
    float_: bool = False

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise SpecError(f'pattern={self.pattern!r} is no pattern: give a module name such as "layers.0.*".')
        for key in ('w_bits', 'a_bits'):
            if getattr(self, key) is not None:
                _check_bits(key, getattr(self, key))
        _check_bool('float', self.float_)
        has_bits = self.w_bits is not None or self.a_bits is not None
        if self.float_ == has_bits:
            problem = 'asks for float and for bits' if has_bits else 'changes nothing'
            raise SpecError(f'The override of {self.pattern!r} {problem}: give w_bits or a_bits, or float=True alone.')

    def to_dict(self) -> Dict[str, Any]:
        """Plain dict with the keys that are set."""
        settings = dict(pattern=self.pattern, w_bits=self.w_bits, a_bits=self.a_bits, float=self.float_ or None)
        return {key: value for key, value in settings.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping) -> 'Override':
        """Inverse of :meth:`to_dict`; SpecError on an unknown key."""
        if not isinstance(data, Mapping):
            raise SpecError(f'{data!r} is no override: give a dict such as dict(pattern="head.*", w_bits=8).')
        _check_keys('an override', data, ('pattern', 'w_bits', 'a_bits', 'float'))
        if 'pattern' not in data:
            raise SpecError(f'The override {dict(data)!r} lacks its pattern: add pattern="<module name>".')
        return cls(data['pattern'], data.get('w_bits'), data.get('a_bits'), data.get('float', False))


@dataclass(frozen=True)
class LayerSpec:
    """Bits, weight scheme and observers of one layer (see :class:`QuantSpec`).

    With ``w_reduce_range`` ``w_bits`` is 7, the bits of the codes, instead of 8. With ``a_symmetric`` activations have
    signed codes and zero point 0.
    """

    w_bits: int = 8
    a_bits: int = 8
    w_symmetric: bool = True
    w_observer: str = 'minmax'
    a_observer: str = 'minmax'
    w_full_range: bool = False
    reparameterize: bool = False
    w_reduce_range: bool = False
    a_symmetric: bool = False


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize and how.

    Weights have one scale per output channel, activations one scale per tensor and an integer zero point.

    Args:
        w_bits: Weight bits, 2 to 8.
        a_bits: Activation bits, 2 to 8.
        scope: ``'backbone'`` or ``'full'`` (neck and heads too).
        points: ``'gemm'`` quantizes both operands of every Linear, convolution and attention product; ``'linear'``
            leaves the attention products in floating point; ``'all'`` quantizes every edge as PSAQ-ViT does: the input
            of every Linear and convolution (image, LayerNorm and GELU outputs, attention output, pooled feature), the
            output of every one that no activation function follows (patch embedding, q/k/v, projection, logits), the
            sum with the position embedding, scores before softmax, and both residual sums.
        quantize_softmax: Quantize the attention weights (post-softmax), the left operand of the second product.
        softmax_quantizer: How: ``'affine'``, or logarithmic with base 2 or sqrt(2) (RepQ-ViT, arXiv 2212.08254, section
            3.3). Not beside ``quantize_softmax=False`` or ``points='linear'``, where it would have no effect.
        symmetric_attention: Signed codes with zero point 0 for queries and values. Of keys the zero point costs
            nothing: it adds the same to all scores of a query.
        reparameterize: Observe LayerNorm outputs that feed a Linear per channel, and fold the channels' scales and zero
            points into LayerNorm and Linear (RepQ-ViT, section 3.2), so that one scale serves.
        input_bits: Activation bits of the first layer (patch embedding), which reads the image.
        w_symmetric: Signed weight codes with zero point 0, else asymmetric ones.
        w_full_range: Symmetric weights only: the scale is ``max|w| / ((2**w_bits - 1) / 2)`` as in PSAQ-ViT's released
            code, half a step of the largest positive weight being clipped, instead of ``max|w| / (2**(w_bits-1) - 1)``.
        w_reduce_range: Hold weights of 8 bits within 7, ``-64 .. 63``: integer kernels that add two products in 16
            bits, those of x86 processors without VNNI, are exact then. (PyTorch and ONNX Runtime call it reduce range.)
        w_observer: ``'minmax'``, ``'percentile'`` or ``'mse'``.
        a_observer: Same choice, for activations.
        overrides: Exceptions by layer name, applied in order; a later one wins. Dicts are accepted.
        target: What the student is made for. ``'default'`` (or None): OpenVINO and ONNX Runtime. ``'tensorrt'``: what a
            strongly typed TensorRT takes as INT8. All activations have 8 bits, signed codes and zero point 0, also
            those that are never negative (after softmax, GELU, ReLU: half of the codes). Weights of 8 bits are
            symmetric, in layers that an override gives 8 bits too. Those of fewer bits stay asymmetric if the spec says
            so: what is stored is the code minus its zero point, which INT8 holds. A preset's choices give way: a
            logarithmic softmax, asymmetric weights of 8 bits, and with ``points='gemm'`` attention weights in floating
            point, because attention is fused only where both of its products are quantized. Settings of your own that
            contradict the target are refused.

    Raises:
        SpecError: A value is not allowed, or contradicts another; the sentence names it and the allowed ones.

    Example:
        >>> QuantSpec.parse('w4a8').label
        'W4A8'
        >>> QuantSpec.parse(dict(preset='w4a4', overrides=[dict(pattern='head*', float=True)]))
        >>> QuantSpec.parse('repq_w6a6').reparameterize
        True
    """

    w_bits: int = 8
    a_bits: int = 8
    scope: str = 'backbone'
    points: str = 'gemm'
    quantize_softmax: bool = True
    softmax_quantizer: str = 'affine'
    symmetric_attention: bool = False
    reparameterize: bool = False
    input_bits: int = 8
    w_symmetric: bool = True
    w_full_range: bool = False
    w_observer: str = 'minmax'
    a_observer: str = 'minmax'
    overrides: Tuple[Override, ...] = ()
    w_reduce_range: bool = False
    target: str = 'default'

    def __post_init__(self):
        for key in ('w_bits', 'a_bits', 'input_bits'):
            _check_bits(key, getattr(self, key))
        for field in fields(self):
            if isinstance(field.default, bool):
                _check_bool(field.name, getattr(self, field.name))
        _check_choice('scope', self.scope, SCOPES)
        _check_choice('points', self.points, POINTS)
        _check_choice('softmax_quantizer', self.softmax_quantizer, SOFTMAX_QUANTIZERS)
        object.__setattr__(self, 'target', TARGETS[0] if self.target is None else self.target)
        _check_choice('target', self.target, TARGETS)
        if self.w_full_range and not self.w_symmetric:
            raise SpecError(
                'w_full_range=True contradicts w_symmetric=False: asymmetric weights use every code anyway.'
            )
        if self.symmetric_attention and self.points != 'gemm':
            raise SpecError(
                f'symmetric_attention=True contradicts points={self.points!r}, where queries and values have no '
                "quantizers of their own: choose points='gemm'."
            )
        if self.softmax_quantizer != 'affine' and (not self.quantize_softmax or self.points == 'linear'):
            off = 'quantize_softmax=False' if not self.quantize_softmax else "points='linear'"
            raise SpecError(
                f'softmax_quantizer={self.softmax_quantizer!r} contradicts {off}, which leaves the attention weights '
                'in floating point: leave one of the two out.'
            )
        _check_choice('w_observer', self.w_observer, OBSERVERS)
        _check_choice('a_observer', self.a_observer, OBSERVERS)
        if isinstance(self.overrides, (str, Mapping)) or not isinstance(self.overrides, Iterable):
            raise SpecError(f'overrides={self.overrides!r} is no list: give a list of dict(pattern=..., w_bits=...).')
        overrides = tuple(o if isinstance(o, Override) else Override.from_dict(o) for o in self.overrides)
        object.__setattr__(self, 'overrides', overrides)
        if self.w_reduce_range and MAX_BITS not in (self.w_bits, *(override.w_bits for override in overrides)):
            raise SpecError(
                f'w_reduce_range=True has nothing to do with w_bits={self.w_bits}: it holds weights of 8 bits within '
                '7, and fewer bits are within 7 as they are; leave it out, or set w_bits=8.'
            )
        if self.target == 'tensorrt':
            self._check_tensorrt()

    def _check_tensorrt(self) -> None:
        """Raise SpecError where a setting contradicts ``target='tensorrt'``."""
        bits = dict(a_bits=self.a_bits, input_bits=self.input_bits)
        bits.update({f'a_bits of the override {o.pattern!r}': o.a_bits for o in self.overrides if o.a_bits is not None})
        for key, value in bits.items():
            if value != MAX_BITS:
                raise SpecError(
                    f"{key}={value} contradicts target='tensorrt', whose integer activations have 8 bits: set 8 bits, "
                    'or leave the target out.'
                )
        if self.softmax_quantizer != 'affine':
            raise SpecError(
                f"softmax_quantizer={self.softmax_quantizer!r} contradicts target='tensorrt', which has no logarithmic "
                "codes: set softmax_quantizer='affine'."
            )
        if not self.w_symmetric and self.w_bits == MAX_BITS:
            raise SpecError(
                "w_symmetric=False contradicts target='tensorrt' with w_bits=8: its weights have zero point 0, which "
                'only asymmetric codes of fewer bits can be brought to; set w_symmetric=True.'
            )

    @property
    def label(self) -> str:
        """Name of the precision, e.g. ``'W4A8'``, ``'W8A8 (7-bit weights)'`` for a reduced range, and
        ``'W8A8 (TensorRT)'`` for that target.
        """
        notes = ['7-bit weights'] if self.w_reduce_range and self.w_bits == MAX_BITS else []
        notes += ['TensorRT'] if self.target == 'tensorrt' else []
        return f'W{self.w_bits}A{self.a_bits}' + (f' ({", ".join(notes)})' if notes else '')

    def resolve(self, name: str, is_input: bool = False) -> Optional[LayerSpec]:
        """What the layer ``name`` gets.

        Args:
            name: Dotted module name.
            is_input: The layer reads the image, so its activations have ``input_bits`` unless overridden by name.

        Returns:
            The layer's spec, or None where an override keeps it in floating point.
        """
        w_bits, a_bits, float_ = self.w_bits, self.input_bits if is_input else self.a_bits, False
        for override in self.overrides:
            if fnmatchcase(name, override.pattern):
                float_ = override.float_
                w_bits = override.w_bits or w_bits
                a_bits = override.a_bits or a_bits
        if float_:
            return None
        reduced, for_tensorrt = self.w_reduce_range and w_bits == MAX_BITS, self.target == 'tensorrt'
        return LayerSpec(
            w_bits - reduced,
            a_bits,
            self.w_symmetric or (for_tensorrt and w_bits == MAX_BITS),
            self.w_observer,
            self.a_observer,
            self.w_full_range,
            self.reparameterize,
            reduced,
            for_tensorrt,
        )

    def to_dict(self) -> Dict[str, Any]:
        """Plain dict of every setting, fit for JSON."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out['overrides'] = [o.to_dict() for o in self.overrides]
        return out

    @classmethod
    def from_dict(cls, data: Mapping) -> 'QuantSpec':
        """Inverse of :meth:`to_dict`. Missing keys have their defaults; an unknown key raises SpecError."""
        _check_keys('the quantization', data, (f.name for f in fields(cls)))
        return cls(**_without_idle_softmax(data, data))

    @classmethod
    def parse(cls, x: Union['QuantSpec', Mapping, str]) -> 'QuantSpec':
        """Read what a config says.

        Args:
            x: A spec, a preset such as ``'w4a8'`` (any bits from 2 to 8, any case), one of a method such as
                ``'psaq_v1_w8a8'`` or ``'repq_w4a4'`` (see :data:`RECIPES`), or a dict of settings that may start from a
                preset: ``dict(preset='w4a8', scope='full')``.

        Raises:
            SpecError: ``x`` is none of these, or a setting is unknown or out of range.
        """
        if isinstance(x, cls):
            return x
        if isinstance(x, str):
            return cls(**cls._preset(x))
        if isinstance(x, Mapping):
            settings = dict(x)
            base = cls._preset(settings.pop('preset')) if 'preset' in settings else {}
            _check_keys('the quantization', settings, [f.name for f in fields(cls)] + ['preset'])
            base = _fit_for_target(base, {**base, **settings})
            return cls(**{**_without_idle_softmax(base, {**base, **settings}), **settings})
        raise SpecError(f'quant={x!r} is no quantization: give a preset such as "w8a8", or a dict of settings.')

    @staticmethod
    def _preset(name: Any) -> Dict[str, Any]:
        match = _PRESET.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise SpecError(
                f'{name!r} is no preset: write w<bits>a<bits>, such as "w8a8", "w4a8", "w6a6" or "w4a4", or a '
                f'method before it, {" or ".join(f"{r}_w8a8" for r in RECIPES)}.'
            )
        recipe = (match[1] or '').lower()
        if recipe and recipe not in RECIPES:
            raise SpecError(f'{name!r} names no method that is known: {nearest(recipe, RECIPES)}.')
        w_bits = int(match[2])
        few = FEW_BITS.get(recipe, {}) if w_bits < 8 else {}
        return dict(RECIPES.get(recipe, {}), **few, w_bits=w_bits, a_bits=int(match[3]))


class AdapterSpec:
    """The spec of a conversion, as adapters get it: it records every name that is resolved.

    Only adapters know the names of the products and edges that they add. The record tells which overrides match one.
    All settings of the spec can be read here too, such as ``points``.

    Args:
        spec: The model's.
        asked: Where names are recorded; a new set by default.
        floating: Nothing is quantized: the adapter's module is excluded.

    Attributes:
        spec: The model's, without a record.
        asked: Names resolved so far.
    """

    def __init__(self, spec: QuantSpec, asked: Optional[Set[str]] = None, floating: bool = False) -> None:
        self.spec, self.floating = spec, floating
        self.asked: Set[str] = set() if asked is None else asked

    def __getattr__(self, name: str) -> Any:
        if name == 'spec':  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.spec, name)

    def resolve(self, name: str, is_input: bool = False) -> Optional[LayerSpec]:
        """As :meth:`QuantSpec.resolve`; None for everything below an excluded module."""
        self.asked.add(name)
        return None if self.floating else self.spec.resolve(name, is_input)

    def excluded(self) -> 'AdapterSpec':
        """The same record for a module whose parts all stay in floating point."""
        return AdapterSpec(self.spec, self.asked, floating=True)
