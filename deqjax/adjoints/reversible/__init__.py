"""The exact gradient of a reversible solve, by running its steps backwards."""

from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._vjp import reversible_vjp as reversible_vjp
