"""All options of `reasoning.py`."""

import dataclasses
from typing import Annotated, Literal

from training.flags import Count, Nonnegative, Only, Positive, Range, Whole
from training.options import Session, Training

Name = Literal["sudoku4", "sudoku6", "sudoku9", "maze", "parity", "permutations", "growth"]
Mixing = Literal["mlp", "attention", "automaton"]
SUDOKUS = ("sudoku4", "sudoku6", "sudoku9")
OWN = Only("adjoint", ("exact", "checkpointed"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PuzzleSession(Session):
    """Options of these tasks that leave the training as it is."""

    starts: Count = 8
    """Random initial states of the measurement of test-time compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PuzzleSession, Training):
    """Trains one recursion with gradients of different depths. Options left at None: the task's."""

    task: Name = "sudoku6"
    """growth: a cellular automaton grows the digit that its first cell names."""
    law: bool = False
    """Every task, size, depth of the gradient and seed of the table on record: hours. What is done
    already is not done again."""
    size: Annotated[
        Count | None, Range(4, 128), Only("task", ("maze", "parity", "permutations", "growth"))
    ] = None
    """Cells a side (of a maze odd), or the length of a sequence."""
    clues: Annotated[Count | None, Only("task", SUDOKUS)] = None
    """Cells of a Sudoku that are given: the fewer, the harder."""
    puzzles: Count | None = None
    """Puzzles to train on, drawn independently: of a small task some are alike."""
    held_out: Count | None = None
    """Puzzles of other solutions, to test on, drawn likewise."""

    last: Annotated[tuple[Whole, ...] | None, OWN] = None
    """Evaluations, the last ones, that the gradient goes through: one run each; 0: all of them.
    Left out: 0 and 1."""
    evaluations: Count | None = None
    """Evaluations of the cell in a training step."""
    adjoint: Literal["exact", "checkpointed", "one-step", "implicit"] = "exact"
    """exact and checkpointed: the gradient of the evaluations taken, by reversal or by checkpoints;
    one-step: of one more evaluation, without damping; implicit: of a fixed point."""
    guard_bits: Annotated[int | None, Range(0, 16, but=(1,)), Only("adjoint", ("exact",))] = None
    """Bits by which a reversed evaluation is corrected; None: as many as suit the cell; 0: it is
    compiled by itself and evaluated once more, with the least memory."""
    retention: Literal["fixed", "learned"] = "fixed"
    """1 - beta is 1/2, or learned, one number per channel."""
    noise: Nonnegative = 0.0
    """Standard deviation of noise that each evaluation adds to the state in training."""
    fire: Annotated[float, Range(0.01, 1), Only("mixing", ("automaton",))] = 1.0
    """Share of an automaton's cells that an evaluation updates, drawn anew by step number."""
    random_depth: bool = False
    """Draws the evaluations of each training step between half and one and a half times them."""
    segments: Count = 1
    """Training steps for which an example keeps its state: deep supervision. A puzzle that is
    solved makes room for another; a picture has to last."""

    mixing: Mixing | None = None
    """How cells exchange what they know: mlp and attention: all with all; automaton: neighbours."""
    width: Count | None = None
    """Channels of the state."""
    hidden: Count | None = None
    """Units of the MLP over channels."""

    steps: Count | None = None
    """Training steps."""
    batch_size: Count | None = None
    """Examples per step, over all devices."""
    warmup: Whole = 100
    """Steps from a rate of 0 to its peak, at most a tenth of all; then a cosine down to 0."""
    learning_rate: Positive | None = None
    """Peak of AdamW's."""

    @property
    def depth(self) -> int:
        """The evaluations that the gradient of one run goes through; 0: all."""
        return (self.last or (0,))[0]

    @property
    def draws(self) -> bool:
        """Whether an evaluation draws anything."""
        return self.noise > 0 or self.fire < 1
