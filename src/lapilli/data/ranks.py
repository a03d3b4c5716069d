"""One step shared out among ranks that wait for each other at every micro-step.

All ranks run the same number of micro-batches, and the costliest of those run side by side decides how long all of them
take. So the bins of a step are made equal in cost (tokens, and pictures in the currency of tokens), from the index
alone, before a picture is read. What a step learns does not depend on the number of ranks: they share its samples.
"""

from collections.abc import Sequence

import numpy as np

from lapilli.data.pack import consecutive, plan_step

RankPlan = list[list[list[int]]]
"""[rank][micro-step]: positions in the step. Every rank has as many micro-steps; an empty one has nothing to run."""


def sample_costs(
    lengths: Sequence[int] | np.ndarray, pictures: Sequence[int] | np.ndarray, image_cost_tokens: float
) -> list[float]:
    """Cost of each sample in tokens: its length, and `image_cost_tokens` for the vision encoder's work per picture.

    A picture's own tokens are part of the length. ViT-L/14 at 336 pixels costs about as much as 10 tokens of a 7B
    language model in training, or 130 of a 0.5B one.
    """
    return (np.asarray(lengths, dtype=np.float64) + image_cost_tokens * np.asarray(pictures)).tolist()


def plan_ranks(
    lengths: Sequence[int], budget_tokens: int, ranks: int, costs: Sequence[float] | None = None
) -> RankPlan:
    """Bin the Examples of one step into micro-batches of at most `budget_tokens` for each of `ranks` ranks.

    Every position comes exactly once. The number of micro-steps is the smallest that `plan_step` finds; all bins are
    balanced by `costs` (default: the lengths), and those of one micro-step are next to each other in cost.
    Raises ExampleTooLong.
    """
    bins = plan_step(lengths, budget_tokens, costs, multiple=ranks)
    weights = lengths if costs is None else costs
    dealt = deal([sum(weights[i] for i in b) for b in bins], ranks)
    return [[[] if i is None else bins[i] for i in mine] for mine in dealt]


def plan_consecutive(n: int, micro_batch_size: int, ranks: int) -> RankPlan:
    """Deal micro-batches of consecutive positions to the ranks in turn, as a sampler of LLaVA's kind does."""
    batches = consecutive(n, micro_batch_size)
    batches += [[] for _ in range(-len(batches) % ranks)]
    return [batches[rank::ranks] for rank in range(ranks)]


def deal(costs: Sequence[float], ranks: int) -> list[list[int | None]]:
    """Deal micro-batches, given by cost, to `ranks` ranks: numbers by [rank][micro-step], None where none is left.

    Neighbours in cost run in the same micro-step, where they wait for each other least; the direction of dealing
    turns at every micro-step, so that the ranks' totals are even as well.
    """
    by_cost = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    falling: list[int | None] = [*by_cost, *[None] * (-len(by_cost) % ranks)]
    steps = [falling[start : start + ranks] for start in range(0, len(falling), ranks)]
    return [[step[rank] if k % 2 == 0 else step[-1 - rank] for k, step in enumerate(steps)] for rank in range(ranks)]


def imbalance(plan: RankPlan, costs: Sequence[float]) -> float:
    """1 - mean / max cost, over all ranks and micro-steps: the part of the time that is waited if they run in step."""
    cells = [sum(costs[i] for i in micro_batch) for mine in plan for micro_batch in mine]
    return 1 - sum(cells) / len(cells) / max(cells) if cells and max(cells) else 0.0
