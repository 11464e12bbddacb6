"""What an attribution holds in memory, counted beforehand, and how many queries that leaves room for at once.

    vectors         per query and parameter: the carry, Gbar, U, and the carry before the step; where workers do the work, of
                    every piece that is under way Gbar, U and the carry. Of a counterfactual question the sensitivities to
                    the parameters and the accumulators after the step and before it, V, H V, and what makes these
    contributions   per query, example of a batch and parameter tensor, float64: of a step, and twice while they are summed
    block           steps read together: state, gradient, the update and its coefficients, and the accumulators; of each run
    slices          what the passes over the examples of a slice keep, forwards and backwards
    kept            the marginals of the result, for all queries

Counted in addition to the process as it stands (Python, torch, the model: about 400 MiB). Bytes throughout.
"""

from dataclasses import dataclass, replace
from math import ceil

MEMORY = 4 << 30  # unless asked otherwise, or one query needs more
SLICE_BYTES = 64 << 20  # of what the calls of a forward pass return for the examples of a slice
SLICE_WEIGHTS = 64  # and at least so many times the bytes of the parameters, which every slice reads again
AHEAD = (8, 4, 2)  # pieces that may be prepared before they are needed, and as many contracted after
PASSES = 5  # of slices: activations, their gradients, what is at work, what the allocator keeps


@dataclass(frozen=True)
class Sizes:
    """Of a run: P parameters in K tensors of `itemsize` bytes, at most B examples a step, `block` steps read together,
    `accumulators` of the optimizer. kept: bytes of the result's marginals. ahead: pieces under way at workers. averages:
    states of an average that are held beside those of the run, and then one vector more per query for each piece. vectors:
    float64, per query. sides: runs that are read. spread: how many times of what is held the allocator holds, where pieces
    of many sizes come and go."""

    parameters: int
    tensors: int
    itemsize: int
    batch: int
    block: int
    accumulators: int
    kept: int
    ahead: int = 0
    averages: int = 0
    vectors: int = 4
    sides: int = 1
    spread: int = 1

    @property
    def per_query(self) -> int:
        more = 1 if self.averages else 0
        return (
            self.parameters * 8 * (self.spread * self.vectors + 2 * more + (3 + more) * self.ahead)
            + 3 * 8 * self.batch * self.tensors
        )

    @property
    def block_bytes(self) -> int:
        run = self.itemsize * (6 * self.block + 2 * self.accumulators)
        return self.parameters * (self.spread * self.sides * run + 8 * self.averages)


@dataclass(frozen=True)
class Budget:
    """at_once: queries of one sweep; slices: bytes of a slice; peak: of everything; ahead: pieces under way at workers."""

    at_once: int
    slices: int
    peak: int
    ahead: int = 0


def slice_bytes(parameters: int, itemsize: int) -> int:
    """Of what the calls of a forward pass return: enough for matrix products to be fast, not so many that memory is slow."""
    return max(SLICE_BYTES, SLICE_WEIGHTS * parameters * itemsize)


def divide(sizes: Sizes, queries: int, memory: int | None = None) -> Budget:
    """As many queries at once as fit, in sweeps of equal size.

    Raises:
        ValueError: not even one fits the memory that was given; says how much it takes.
    """
    if memory is not None and (not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory is not a number of bytes: got {memory!r}, expected an integer such as 2 << 30.")
    fixed = sizes.block_bytes + sizes.kept
    if memory is None:  # nobody asked for a bound: one query is never refused
        memory = max(MEMORY, fixed + 2 * sizes.per_query + 4 * PASSES * SLICE_BYTES)
    wanted = slice_bytes(sizes.parameters, sizes.itemsize)
    slices = max(1 << 20, min(wanted, (memory - fixed) // (4 * PASSES)))  # a quarter of it for slices
    room = memory - fixed - PASSES * slices
    if room < sizes.per_query:
        least = fixed + PASSES * (1 << 20) + sizes.per_query
        raise ValueError(
            f"the memory does not hold one query: got {memory} bytes, expected at least {ceil(least * 4 / 3)}, of which "
            f"{sizes.block_bytes} for the steps read together and {sizes.kept} for what is kept. Allow more, keep fewer "
            f"axes with keep=, or record with a smaller block=."
        )
    sweeps = ceil(queries / (room // sizes.per_query))
    at_once = ceil(queries / sweeps)
    return Budget(at_once, slices, fixed + PASSES * slices + at_once * sizes.per_query, sizes.ahead)


def divide_ahead(sizes: Sizes, queries: int, memory: int | None = None) -> Budget:
    """The same where workers do the work: with as few sweeps as can be, and then as many pieces under way."""
    found = []
    for ahead in AHEAD:
        try:
            found.append(divide(replace(sizes, ahead=ahead), queries, memory))
        except ValueError:
            if ahead == AHEAD[-1] and not found:
                raise
    return max(found, key=lambda budget: budget.at_once)
