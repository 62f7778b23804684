"""Vector instructions for the compiled kernels: the inner loops that numba's own vectoriser does not find, written as LLVM IR.

Each function emits a few instructions on vectors of 32 half words, 16 words or 16 floats. LLVM maps them to the registers of the
machine (one or two of AVX-512, two or four of AVX2, four or eight of NEON), so users need no compiler. Arrays are C-contiguous,
offsets count elements, and bounds are not checked, so only the other modules of this folder call these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

compiled: Any = numba.njit(nogil=True, cache=True)
LANES = 32  # half words in a vector of 64 bytes
_FEATURES = llvmlite.binding.get_host_cpu_features()
TOKENS = 128 if _FEATURES.get("avx512f") else 64  # floats that a sparse product accumulates in registers

_I1, _I8, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_V16, _V32, _VF = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, 16)
_W32 = ir.VectorType(_I32, 16)
_NONE, _INT, _FLOAT, _ARRAY = types.void, types.int64, types.float32, None  # types of a kernel's result and arguments


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _load(builder: Any, pointer: Any, vector: Any, step: int = 0) -> Any:
    at = builder.bitcast(builder.gep(pointer, [ir.Constant(_I64, step * vector.count)]), vector.as_pointer())
    value = builder.load(at)
    value.align = vector.element.width // 8 if isinstance(vector.element, ir.IntType) else 4
    return value


def _store(builder: Any, value: Any, pointer: Any, step: int = 0) -> None:
    at = builder.bitcast(builder.gep(pointer, [ir.Constant(_I64, step * value.type.count)]), value.type.as_pointer())
    done = builder.store(value, at)
    done.align = value.type.element.width // 8 if isinstance(value.type.element, ir.IntType) else 4


def _call(builder: Any, name: str, result: Any, arguments: list[Any], **flags: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments, **flags)


def _loop(builder: Any, start: Any, stop: Any) -> Any:
    return cgutils.for_range_slice(builder, start, stop, ir.Constant(_I64, 1), intp=_I64)


@contextmanager
def _blocks(builder: Any, count: Any, size: int) -> Iterator[Any]:
    """Loop over `count` blocks of `size` elements, and yield the offset of each."""
    with _loop(builder, ir.Constant(_I64, 0), count) as (i, _):
        yield builder.mul(i, ir.Constant(_I64, size))


def _kernel(result: Any, *kinds: Any) -> Any:
    """Return a decorator that makes a numba intrinsic of a function that emits its instructions, arrays given as data pointers.

    The intrinsic is called without the builder, which a type checker cannot know.
    """

    def made(emit: Callable[..., Any]) -> Any:
        @wraps(emit)
        def typed(typing: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                values = (
                    context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
                    for kind, value in zip(signature.args, arguments, strict=True)
                )
                returned = emit(builder, *values)
                return context.get_dummy_value() if returned is None else returned

            return result(*(its if kind is _ARRAY else kind for kind, its in zip(kinds, given, strict=True))), generate

        return intrinsic(typed)

    return made


def _magnitude(builder: Any, pattern: Any) -> Any:
    """Return the magnitudes of float32 (words) or bfloat16 (half words) bit patterns, NaN as infinity."""
    vector = pattern.type
    sign, infinity = (0x7FFF, 0x7F80) if vector.element == _I16 else (0x7FFFFFFF, 0x7F800000)
    magnitude, infinite = builder.and_(pattern, _constant(vector, sign)), _constant(vector, infinity)
    return builder.select(builder.icmp_signed("<", magnitude, infinite), magnitude, infinite)


def _words(bits: Any) -> Any:
    """Return the vector type of 32 bit patterns of floats: words for float32, half words for bfloat16."""
    return _V16 if bits.type.pointee == _I16 else _V32


@_kernel(_NONE, _ARRAY, _INT, _ARRAY, _INT, _INT)
def upper_halves(builder: Any, bits: Any, at: Any, out: Any, out_at: Any, vectors: Any) -> None:
    """Write to out the upper halves of magnitudes of float bit patterns (all of a bfloat16), which order them coarsely."""
    vector, source, target = _words(bits), builder.gep(bits, [at]), builder.gep(out, [out_at])
    with _blocks(builder, vectors, LANES) as offset:
        half = _magnitude(builder, _load(builder, builder.gep(source, [offset]), vector))
        if vector is _V32:
            half = builder.trunc(builder.lshr(half, _constant(_V32, 16)), _V16)
        _store(builder, half, builder.gep(target, [offset]))


def _counted(builder: Any, half: Any, at: Any, vectors: Any, limit: Any) -> Any:
    """Return, for each lane, the number of `vectors` vectors of half words whose value is at least the limit's."""
    source, total = builder.gep(half, [at]), cgutils.alloca_once_value(builder, _constant(_V16, 0))
    with _blocks(builder, vectors, LANES) as offset:
        value = _load(builder, builder.gep(source, [offset]), _V16)
        hit = builder.sext(builder.icmp_signed(">=", value, limit), _V16)
        builder.store(builder.sub(builder.load(total), hit), total)
    return builder.load(total)


@_kernel(_INT, _ARRAY, _INT, _INT, _INT)
def count_row(builder: Any, half: Any, at: Any, vectors: Any, threshold: Any) -> Any:
    """Return the number of `vectors` * LANES half words that are at least the threshold (fewer than 2**15 vectors)."""
    limit = _splat(builder, builder.trunc(threshold, _I16), _V16)
    wide = builder.sext(_counted(builder, half, at, vectors, limit), _V32)
    return builder.sext(_call(builder, "llvm.vector.reduce.add.v32i32", _I32, [wide]), _I64)


@_kernel(_NONE, _ARRAY, _INT, _INT, _ARRAY, _ARRAY)
def count_lanes(builder: Any, half: Any, at: Any, rows: Any, threshold: Any, count: Any) -> None:
    """Set count[l] to the number of `rows` vectors whose lane l is at least threshold[l] (fewer than 2**15 rows)."""
    _store(builder, _counted(builder, half, at, rows, _load(builder, threshold, _V16)), count)


@_kernel(_INT, _ARRAY, _INT, _ARRAY)
def equal_lanes(builder: Any, half: Any, at: Any, wanted: Any) -> Any:
    """Return an integer whose bit l is set if the vector at `at` equals wanted in lane l."""
    value = _load(builder, builder.gep(half, [at]), _V16)
    equal = builder.icmp_signed("==", value, _load(builder, wanted, _V16))
    return builder.zext(builder.bitcast(equal, ir.IntType(LANES)), _I64)


@_kernel(_INT, _INT)
def lowest_bit(builder: Any, bits: Any) -> Any:
    """Return the index of the lowest bit that is set."""
    return _call(builder, "llvm.cttz.i64", _I64, [bits, ir.Constant(_I1, 1)])


@_kernel(_NONE, _ARRAY, _INT, _INT, _INT, _INT, _ARRAY)
def count_words(builder: Any, bits: Any, at: Any, vectors: Any, low: Any, high: Any, counts: Any) -> None:
    """Set counts[0], counts[1] to how many of `vectors` * 16 float32 magnitudes (bits) are at least low, and at least high."""
    source = builder.gep(bits, [at])
    limits = [_splat(builder, builder.trunc(value, _I32), _W32) for value in (low, high)]
    totals = [cgutils.alloca_once_value(builder, _constant(_W32, 0)) for _ in limits]
    with _blocks(builder, vectors, 16) as offset:
        word = _load(builder, builder.gep(source, [offset]), _W32)
        word = builder.and_(word, _constant(_W32, 0x7FFFFFFF))
        for limit, total in zip(limits, totals, strict=True):
            hit = builder.sext(builder.icmp_signed(">=", word, limit), _W32)
            builder.store(builder.sub(builder.load(total), hit), total)
    for step, total in enumerate(totals):
        summed = builder.sext(_call(builder, "llvm.vector.reduce.add.v16i32", _I32, [builder.load(total)]), _I64)
        builder.store(summed, builder.gep(counts, [ir.Constant(_I64, step)]))


@_kernel(_NONE, _ARRAY, _INT, _ARRAY, _ARRAY, _ARRAY)
def write_kept(builder: Any, bits: Any, at: Any, limits: Any, kept: Any, mask: Any) -> None:
    """Write to kept 32 float bit patterns (words: float32, half words: bfloat16), or 0 where the magnitude (of NaN infinite) is
    below limits[l] (bits), and write the mask of those kept.
    """
    vector = _words(bits)
    word = _load(builder, builder.gep(bits, [at]), vector)
    keep = builder.icmp_signed(">=", _magnitude(builder, word), _load(builder, limits, vector))
    _store(builder, builder.select(keep, word, _constant(vector, 0)), builder.gep(kept, [at]))
    _store(builder, builder.zext(keep, ir.VectorType(_I8, LANES)), builder.gep(mask, [at]))


@_kernel(_NONE, _ARRAY, _INT, _ARRAY, _ARRAY)
def keep_words(builder: Any, bits: Any, at: Any, mask: Any, kept: Any) -> None:
    """Write to kept 32 words (or half words) where the mask is true, and 0 elsewhere."""
    vector, inside = _words(bits), _load(builder, builder.gep(mask, [at]), ir.VectorType(_I8, LANES))
    keep = builder.icmp_unsigned("!=", inside, _constant(inside.type, 0))
    word = _load(builder, builder.gep(bits, [at]), vector)
    _store(builder, builder.select(keep, word, _constant(vector, 0)), builder.gep(kept, [at]))


def _weighted_sum(tokens: int) -> Any:
    """Make a kernel: y[t] = bias + sum over nonzeros p of value[p] * x[index[p], t], with the `tokens` sums kept in registers."""

    @_kernel(_NONE, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _INT, _INT, _FLOAT, _ARRAY, _INT)
    def weighted_sum(
        builder: Any, x: Any, x_at: Any, stride: Any, index: Any, value: Any, start: Any, stop: Any, bias: Any, y: Any, y_at: Any
    ) -> None:
        x, y = builder.gep(x, [x_at]), builder.gep(y, [y_at])
        first = _splat(builder, bias, _VF)
        sums = [cgutils.alloca_once_value(builder, first) for _ in range(tokens // 16)]
        with _loop(builder, start, stop) as (p, _):
            row = _row(builder, x, index, p, stride)
            weight = _splat(builder, builder.load(builder.gep(value, [p])), _VF)
            for step, each in enumerate(sums):
                builder.store(_fma(builder, weight, _load(builder, row, _VF, step), builder.load(each)), each)
        for step, each in enumerate(sums):
            _store(builder, builder.load(each), y, step)

    return weighted_sum


def _inner_products(tokens: int) -> Any:
    """Make a kernel: out[p] += sum over `tokens` tokens of x[index[p], t] * y[t], with y kept in registers."""

    @_kernel(_NONE, _ARRAY, _INT, _INT, _ARRAY, _INT, _INT, _ARRAY, _INT, _ARRAY)
    def inner_products(
        builder: Any, x: Any, x_at: Any, stride: Any, index: Any, start: Any, stop: Any, y: Any, y_at: Any, out: Any
    ) -> None:
        x, y = builder.gep(x, [x_at]), builder.gep(y, [y_at])
        fixed = [_load(builder, y, _VF, step) for step in range(tokens // 16)]
        with _loop(builder, start, stop) as (p, _):
            row = _row(builder, x, index, p, stride)
            sums: list[Any] = [None, None]
            for step, each in enumerate(fixed):
                other, so_far = _load(builder, row, _VF, step), sums[step % 2]
                sums[step % 2] = builder.fmul(each, other) if so_far is None else _fma(builder, each, other, so_far)
            both = sums[0] if sums[1] is None else builder.fadd(sums[0], sums[1])
            at = builder.gep(out, [p])
            builder.store(builder.fadd(builder.load(at), _total(builder, both)), at)

    return inner_products


def _row(builder: Any, x: Any, index: Any, p: Any, stride: Any) -> Any:
    """Return a pointer to x[index[p]]."""
    return builder.gep(x, [builder.mul(builder.sext(builder.load(builder.gep(index, [p])), _I64), stride)])


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _VF, [a, b, c])


def _total(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector of floats, added in any order."""
    arguments = [ir.Constant(_F32, 0.0), vector]
    return _call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, arguments, fastmath=("reassoc",))


_EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _exponential(builder: Any, x: Any) -> Any:
    """Return exp of a vector of floats to within 2 units in the last place; 0 below -87, exp(88) above 88."""
    lowest, highest = _constant(_VF, -87.0), _constant(_VF, 88.0)
    tiny = builder.fcmp_ordered("<", x, lowest)
    x = builder.select(tiny, lowest, x)
    x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
    whole = _call(builder, "llvm.rint.v16f32", _VF, [builder.fmul(x, _constant(_VF, 1.44269504088896341))])
    rest = _fma(builder, whole, _constant(_VF, -0.693359375), x)
    rest = _fma(builder, whole, _constant(_VF, 2.12194440e-4), rest)
    power = _constant(_VF, _EXPONENTIAL[0])
    for coefficient in _EXPONENTIAL[1:]:
        power = _fma(builder, power, rest, _constant(_VF, coefficient))
    power = builder.fadd(_fma(builder, power, builder.fmul(rest, rest), rest), _constant(_VF, 1.0))
    exponent = builder.shl(builder.add(builder.fptosi(whole, _W32), _constant(_W32, 127)), _constant(_W32, 23))
    return builder.select(tiny, _constant(_VF, 0.0), builder.fmul(power, builder.bitcast(exponent, _VF)))


@_kernel(_FLOAT, _ARRAY, _INT, _INT, _FLOAT)
def exponentials(builder: Any, x: Any, at: Any, vectors: Any, shift: Any) -> Any:
    """Set x = exp(x - shift) for `vectors` * 16 floats, in place, and return their sum."""
    x, shift = builder.gep(x, [at]), _splat(builder, shift, _VF)
    total = cgutils.alloca_once_value(builder, _constant(_VF, 0.0))
    with _blocks(builder, vectors, 16) as offset:
        at = builder.gep(x, [offset])
        power = _exponential(builder, builder.fsub(_load(builder, at, _VF), shift))
        _store(builder, power, at)
        builder.store(builder.fadd(builder.load(total), power), total)
    return _total(builder, builder.load(total))


@_kernel(_NONE, _ARRAY, _INT, _INT, _ARRAY, _ARRAY)
def gelus(builder: Any, x: Any, at: Any, vectors: Any, y: Any, derivative: Any) -> None:
    """Set y = x / (1 + exp(-2 u)) = x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + .044715 x^3), and derivative = dy / dx."""
    one, root = _constant(_VF, 1.0), 0.7978845608028654
    with _blocks(builder, vectors, 16) as step:
        offset = [builder.add(at, step)]
        value = _load(builder, builder.gep(x, offset), _VF)
        square = builder.fmul(value, value)
        inner = _fma(builder, square, _constant(_VF, 2 * root * 0.044715), _constant(_VF, 2 * root))
        power = _exponential(builder, builder.fneg(builder.fmul(value, inner)))
        share = builder.fdiv(one, builder.fadd(one, power))
        steep = _fma(builder, square, _constant(_VF, 6 * root * 0.044715), _constant(_VF, 2 * root))
        rise = builder.fmul(builder.fmul(share, builder.fsub(one, share)), builder.fmul(value, steep))
        _store(builder, builder.fmul(value, share), builder.gep(y, offset))
        _store(builder, builder.fadd(share, rise), builder.gep(derivative, offset))


@_kernel(_NONE, _ARRAY, _INT, _FLOAT, _ARRAY, _INT)
def add_scaled(builder: Any, y: Any, y_at: Any, scale: Any, x: Any, vectors: Any) -> None:
    """Add scale * x to y for `vectors` * 16 floats."""
    y, scale = builder.gep(y, [y_at]), _splat(builder, scale, _VF)
    with _blocks(builder, vectors, 16) as offset:
        at, other = builder.gep(y, [offset]), _load(builder, builder.gep(x, [offset]), _VF)
        _store(builder, _fma(builder, scale, other, _load(builder, at, _VF)), at)


@_kernel(_NONE, _ARRAY, _INT, _ARRAY, _ARRAY, _INT, _FLOAT, _INT, _ARRAY, _ARRAY)
def mix_lanes(
    builder: Any, change: Any, at: Any, held: Any, share: Any, share_at: Any, mean: Any, vectors: Any, through: Any, y: Any
) -> None:
    """For `vectors` * 16 values a, given in change, set y = a if the share is 1, otherwise mean + share (a - mean); change =
    a - mean; through = the share if held is true, otherwise 0.
    """
    middle, bytes16 = _splat(builder, mean, _VF), ir.VectorType(_I8, 16)
    with _blocks(builder, vectors, 16) as step:
        offset = [builder.add(at, step)]
        value, part = _load(builder, builder.gep(change, offset), _VF), builder.gep(share, [builder.add(share_at, step)])
        part, difference = _load(builder, part, _VF), builder.fsub(value, middle)
        whole = builder.fcmp_ordered("==", part, _constant(_VF, 1.0))
        keep = builder.icmp_unsigned("!=", _load(builder, builder.gep(held, offset), bytes16), _constant(bytes16, 0))
        mixed = builder.select(whole, value, _fma(builder, part, difference, middle))
        _store(builder, difference, builder.gep(change, offset))
        _store(builder, mixed, builder.gep(y, offset))
        _store(builder, builder.select(keep, part, _constant(_VF, 0.0)), builder.gep(through, offset))


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the transpose of 16 vectors of 16 elements: four times, vectors i and i + 8 are interleaved."""
    places = [place for i in range(8) for place in (i, 16 + i)], [place for i in range(8, 16) for place in (i, 16 + i)]
    for _ in range(4):
        pairs = [(rows[i], rows[i + 8]) for i in range(8)]
        rows = [builder.shuffle_vector(*pair, ir.Constant(_W32, half)) for pair in pairs for half in places]
    return rows


def _lane_pointer(builder: Any, x: Any, at: Any, lane: Any, step: int, place: Any) -> Any:
    """Return a pointer to x[at[lane + step] + place]."""
    begin = builder.load(builder.gep(at, [builder.add(lane, ir.Constant(_I64, step))]))
    return builder.gep(x, [builder.add(begin, place)])


@_kernel(_NONE, _ARRAY, _ARRAY, _INT, _INT, _ARRAY, _INT)
def transpose_masks(builder: Any, mask: Any, at: Any, lane: Any, place: Any, share: Any, lanes: Any) -> None:
    """Set share[c * lanes + lane + l] = mask[at[lane + l] + place + c], 16 channels c by 16 lanes l; mask: bytes or floats."""
    vector = ir.VectorType(_I8 if mask.type.pointee == _I8 else _F32, 16)
    rows = [_load(builder, _lane_pointer(builder, mask, at, lane, step, place), vector) for step in range(16)]
    for channel, row in enumerate(_transposed(builder, rows)):
        value = row if vector.element == _F32 else builder.uitofp(row, _VF)
        to = builder.add(builder.mul(lanes, ir.Constant(_I64, channel)), lane)
        _store(builder, value, builder.gep(share, [to]))


@_kernel(_NONE, _ARRAY, _ARRAY, _ARRAY, _INT, _INT, _ARRAY, _INT, _INT, _ARRAY)
def masks_backward(
    builder: Any, dy: Any, change: Any, through: Any, begin: Any, lanes: Any, at: Any, lane: Any, place: Any, to: Any
) -> None:
    """Backward pass of 16 channels from `begin` on: to[at[lane + l] + place + c] += dy change, lane by lane; dy *= through."""
    rows = []
    for channel in range(16):
        offset = builder.add(builder.mul(lanes, ir.Constant(_I64, channel)), builder.add(begin, lane))
        above, *others = (builder.gep(x, [offset]) for x in (dy, change, through))
        value, difference, share = (_load(builder, x, _VF) for x in (above, *others))
        rows.append(builder.fmul(value, difference))
        _store(builder, builder.fmul(value, share), above)
    for step, row in enumerate(_transposed(builder, rows)):
        total = _lane_pointer(builder, to, at, lane, step, place)
        _store(builder, builder.fadd(_load(builder, total, _VF), row), total)


weighted_sum_64 = _weighted_sum(64)
weighted_sum_32 = _weighted_sum(32)
weighted_sum, weighted_sum_16 = _weighted_sum(TOKENS), _weighted_sum(16)
inner_products, inner_products_16 = _inner_products(TOKENS), _inner_products(16)
