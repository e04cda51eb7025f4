"""Exponentials of floats as vector instructions."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hire.ops.cpu.dots import FLOAT, INT32, INT64, for_vectors, in_all_lanes, load, splat, vector

# exp(x) = 2^n exp(r) with x = n ln 2 + r and |r| at most half of ln 2. The terms of the series of
# exp(r) beyond the seventh power are less than 1e-8.
LOG2_E, LN2_HIGH, LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
# Adding 1.5 * 2^23 rounds a float to an integer, which is then its last bits.
ROUNDER = 12582912.0
ROUNDER_BITS = 0x4B400000
# Below it the exponential is less than the smallest normal number: it counts as 0.
LOWEST = -87.0


def exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return the exponential of floats of at most 0; NaN stays NaN."""
    floats, ints = x.type, vector(INT32, x.type.count)
    constant = {
        value: splat(floats, value)
        for value in (LOG2_E, LN2_HIGH, LN2_LOW, ROUNDER, LOWEST, *COEFFICIENTS)
    }
    is_zero = builder.fcmp_ordered("<", x, constant[LOWEST])
    shifted = builder.fadd(builder.fmul(x, constant[LOG2_E]), constant[ROUNDER])
    n = builder.fsub(shifted, constant[ROUNDER])
    rest = builder.fsub(x, builder.fmul(n, constant[LN2_HIGH]))
    rest = builder.fsub(rest, builder.fmul(n, constant[LN2_LOW]))
    polynomial = constant[COEFFICIENTS[0]]
    for coefficient in COEFFICIENTS[1:]:
        polynomial = builder.fadd(builder.fmul(polynomial, rest), constant[coefficient])
    exponent = builder.sub(builder.bitcast(shifted, ints), splat(ints, ROUNDER_BITS - 127))
    power = builder.bitcast(builder.shl(exponent, splat(ints, 23)), floats)
    return builder.select(is_zero, splat(floats, 0), builder.fmul(polynomial, power))


@intrinsic
def exponentials(typing_context, address, count, shift):
    """Replace floats by the exponentials of what they exceed a shift by, and return their sum.

    Args:
        address: Address of the floats.
        count: Number of floats.
        shift: A number that none of them exceeds.
    """

    def generate(context, builder, signature, arguments):
        address, count, shift = arguments
        total = cgutils.alloca_once_value(builder, FLOAT(0))

        def replace(item: ir.Value, lanes: int) -> None:
            place = builder.add(address, builder.mul(item, INT64(4)))
            floats = vector(FLOAT, lanes)
            shifts = in_all_lanes(builder, shift, lanes)
            result = exponential(builder, builder.fsub(load(builder, place, floats), shifts))
            builder.store(result, builder.inttoptr(place, floats.as_pointer()), align=4)
            value = builder.load(total)
            for lane in range(lanes):
                value = builder.fadd(value, builder.extract_element(result, INT32(lane)))
            builder.store(value, total)

        for_vectors(builder, count, replace)
        return builder.load(total)

    return types.float32(types.int64, types.int64, types.float32), generate
