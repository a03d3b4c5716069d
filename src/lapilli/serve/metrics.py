"""What a server has done, in numbers, as Prometheus reads them.

Written by the event loop alone, so nothing here locks. Labels come from fixed lists and from the names that the
operator gave to models, never from requests: what users send can't make the page grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[tuple[str, str], ...]

_HELP = {
    "lapilli_http_requests_total": "Requests answered, by path and status.",
    "lapilli_http_request_seconds": "From a request's arrival to the last byte of its answer.",
    "lapilli_answers_total": "Answers that ended, by reason.",
    "lapilli_prompt_tokens_total": "Tokens of prompts that were taken.",
    "lapilli_completion_tokens_total": "Tokens that were written.",
    "lapilli_pictures_total": "Pictures that were taken.",
    "lapilli_first_token_seconds": "From a request's arrival to its first text.",
    "lapilli_refused_total": "Requests refused, by reason.",
    "lapilli_moderation_total": "Questions that a moderation service was asked about, by result.",
    "lapilli_moderation_seconds": "From asking the moderation service to its answer.",
}


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[Labels, _Histogram]] = defaultdict(lambda: defaultdict(_Histogram))

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one measurement to a histogram."""
        histogram = self._histograms[name][tuple(sorted(labels.items()))]
        histogram.counts[bisect_left(_SECONDS, seconds)] += 1
        histogram.total += seconds

    def text(self, gauges: Mapping[str, tuple[str, Iterable[tuple[dict[str, str], float]]]]) -> str:
        """The page. `gauges`: name to what it is and its values now, each with its labels."""
        lines: list[str] = []
        for name, values in sorted(self._counters.items()):
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} counter"]
            lines += [f"{name}{_written(labels)} {value:.15g}" for labels, value in sorted(values.items())]
        for name, histograms in sorted(self._histograms.items()):
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} histogram"]
            for labels, histogram in sorted(histograms.items()):
                so_far = 0
                for bound, number in zip((*map(str, _SECONDS), "+Inf"), histogram.counts, strict=True):
                    so_far += number
                    lines.append(f"{name}_bucket{_written((*labels, ('le', bound)))} {so_far}")
                lines.append(f"{name}_sum{_written(labels)} {histogram.total:.9g}")
                lines.append(f"{name}_count{_written(labels)} {so_far}")
        for name, (what, values) in gauges.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge"]
            lines += [f"{name}{_written(tuple(labels.items()))} {value:.15g}" for labels, value in values]
        return "\n".join(lines) + "\n"


def _written(labels: Labels) -> str:
    escaped = {k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in labels}
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped.items()) + "}" if labels else ""
