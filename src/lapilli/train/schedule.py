"""The learning rate of each step, as a factor of the peak.

Warm-up and cosine are those of transformers' scheduler, which trained every LLaVA: the first step runs at 0. A factor
is a pure function of the step, so a resumed run needs no schedule state.
"""

import math

from lapilli.recipe.schema import Train


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Number of steps below the peak at the start of the run."""
    return math.ceil(warmup_ratio * total_steps)


def factor(step: int, total_steps: int, train: Train) -> float:
    """Return what the learning rates are multiplied by at `step`, counted from 1."""
    done, warmup = step - 1, warmup_steps(total_steps, train.warmup_ratio)
    if done < warmup:
        return done / max(1, warmup)
    progress = (done - warmup) / max(1, total_steps - warmup)
    if train.schedule == "constant":
        return 1.0
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_learning_rate_ratio + (1 - train.min_learning_rate_ratio) * max(0.0, falling)
