"""The names of what is measured, which the options of the scripts are made of."""

from typing import Literal

Method = Literal[
    "exact",
    "isolated",
    "float",
    "float64 state",
    "segmented",
    "checkpointed",
    "implicit",
    "phantom",
]

TITLES: dict[Method, str] = {
    "exact": "exact reversal (integers, guard digits)",
    "isolated": "exact reversal, f isolated",
    "float": "float reversal",
    "float64 state": "float reversal, float64 state",
    "segmented": "segmented float reversal",
    "checkpointed": "checkpointed autodiff",
    "implicit": "implicit gradient",
    "phantom": "phantom gradient (5 damped steps)",
}
# These differentiate the fixed point and not the steps: they differ from the reference by design
# until the iteration has converged, and the phantom gradient ever after.
OF_THE_FIXED_POINT: tuple[Method, ...] = ("implicit", "phantom")

PER_CHANNEL = "n/64"  # a 1 - beta per channel

DType = Literal["float32", "bfloat16"]
Variant = Literal[
    "exact", "isolated", "float", "checkpointed", "explicit", "explicit, checkpointed"
]
# Evaluations of f that a variant needs for each one, beyond that of the VJP itself. Checkpointed
# autodiff of a loop evaluates f forwards and again to recompute a stretch of it; of a stack, whose
# blocks are checkpointed one by one, the second is the VJP's own.
EXTRA: dict[Variant, int] = {
    "exact": 1,
    "isolated": 2,
    "float": 1,
    "checkpointed": 2,
    "explicit": 0,
    "explicit, checkpointed": 1,
}
VJP_FLOP = 3  # of those of f: f itself, and two products for each of its own


def floor(variant: Variant, evaluations: int, f: float, vjp: float) -> float:
    """The least that value and gradient take, from the seconds of f and of f with its VJP."""
    return evaluations * (EXTRA[variant] * f + vjp)


def needed_flop(variant: Variant, evaluations: int, flop: float) -> float:
    """Operations of the floor, from those of one f."""
    return floor(variant, evaluations, flop, VJP_FLOP * flop)
