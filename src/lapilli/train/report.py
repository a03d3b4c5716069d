"""`report.html` of a run: its curves and totals on one page that needs nothing but itself.

The sections are made here for other reports too: a demonstration of several stages shows each stage's own.
"""

import math
from collections.abc import Sequence
from typing import Any

from lapilli.base.html import NARROW, Html, join, line_chart, page, section, side_by_side, table, tag, write_page
from lapilli.base.progress import duration
from lapilli.train.monitor import compact
from lapilli.train.setup import Prepared


def loss_section(heading: str, rows: Sequence[dict[str, Any]]) -> Html:
    """Training loss of every step, and validation loss where it was computed."""
    curves = {"training": _curve(rows, "loss")}
    held_out = [(r["step"], r["validation_loss"]) for r in rows if r.get("validation_loss") is not None]
    if held_out:
        curves["validation"] = held_out
    marks = {
        "skipped": [r["step"] for r in rows if "skipped" in r],
        "saved": [r["step"] - 1 for r in rows if _saved(r)],
    }
    return section(heading, line_chart(curves, marks=marks))


def _saved(row: dict[str, Any]) -> bool:
    return row.get("save_seconds") is not None


def evaluation_section(rows: Sequence[dict[str, Any]]) -> Html:
    """The scores of every task that was followed, a chart each: their scales have nothing in common."""
    tasks = dict.fromkeys(name for row in rows for name in row.get("evaluation", {}))
    if not tasks:
        return join()
    charts: list[Html] = []
    missing: list[Html] = []
    for name in tasks:
        found = [(row["step"], row["evaluation"][name]) for row in rows if name in row.get("evaluation", {})]
        points = [(step, score) for step, score in found if score is not None]
        charts.append(line_chart({name: points}, y_label="score", width=NARROW))
        if len(points) < len(found):
            missing.append(tag("p", f"{name}: no score at {len(found) - len(points)} of {len(found)} evaluations"))
    return section("Evaluation", side_by_side(*charts), *missing)


def learning_section(rows: Sequence[dict[str, Any]]) -> Html:
    """Learning rate and gradient norm of every step."""
    return section(
        "Learning rate and gradient norm",
        side_by_side(
            line_chart({"learning rate": _curve(rows, "learning_rate")}, y_label="learning rate", width=NARROW),
            line_chart({"before clipping": _curve(rows, "grad_norm")}, y_label="gradient norm", width=NARROW),
        ),
    )


def machine_section(rows: Sequence[dict[str, Any]]) -> Html:
    """What the machine did in every step: throughput, memory, waiting for data, standing still for checkpoints."""
    steps = [row for row in rows if row["seconds"]]
    speed = [(r["step"], r["tokens"] / r["seconds"]) for r in steps]
    waits = [(r["step"], 100 * r["wait_seconds"] / r["seconds"]) for r in steps]
    memory = [(r["step"], r["memory_bytes"] / 2**30) for r in rows]
    times = {"whole step": [(r["step"], r["seconds"]) for r in rows]}
    saved = [(r["step"], r["save_seconds"]) for r in rows if r.get("save_seconds") is not None]
    if saved:
        times["waiting to save"] = saved
    return section(
        "Throughput, memory, waiting",
        side_by_side(
            line_chart({"tokens per second": speed}, y_label="tokens/s", width=NARROW),
            line_chart(times, y_label="seconds", width=NARROW),
            line_chart({"peak so far": memory}, y_label="GiB", width=NARROW),
            line_chart({"waiting for data": waits}, y_label="% of a step", width=NARROW),
        ),
    )


def write_report(ready: Prepared, rows: Sequence[dict[str, Any]]) -> None:
    """Write the run's report from its metrics."""
    stage, index = ready.stage, ready.corpus.index
    seconds = sum(r["seconds"] for r in rows)
    tokens = sum(r["tokens"] for r in rows)
    losses = [r["loss"] for r in rows if r["loss"] is not None]
    skipped = [r["step"] for r in rows if "skipped" in r]
    held_out = [r["validation_loss"] for r in rows if r.get("validation_loss") is not None]
    scores = {name: value for row in rows for name, value in row.get("evaluation", {}).items()}
    totals: list[tuple[str, object]] = [
        ("started from", stage.model),
        ("steps", ready.total_steps),
        ("samples", sum(r["samples"] for r in rows)),
        ("tokens", tokens),
        ("supervised tokens", sum(r["supervised_tokens"] for r in rows)),
        ("first and last loss", f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "-"),
        *([("steps skipped, not finite", ", ".join(map(str, skipped)))] if skipped else []),
        *([("last validation loss", f"{held_out[-1]:.4f}")] if held_out else []),
        *((f"last score, {name}", "-" if value is None else f"{value:.2f}") for name, value in scores.items()),
        ("time in steps", duration(seconds)),
        ("tokens per second", compact(tokens / seconds) if seconds else "-"),
        ("waiting for data", f"{sum(r['wait_seconds'] for r in rows) / seconds:.1%}" if seconds else "-"),
        # A run that goes on after its last step, in a folder of its own, has no row.
        ("padding", f"{sum(r['padding'] for r in rows) / len(rows):.1%}" if rows else "-"),
        ("peak memory", compact(max(r["memory_bytes"] for r in rows), 1024) if rows else "-"),
        ("device", f"{ready.device.describe()}, {stage.run.precision}"),
    ]
    parts = [(p.part, p.trainable, p.frozen, p.unused) for p in ready.parts]
    left_out: list[tuple[str, int]] = [("records dropped", index.dropped)] if index.dropped else []
    left_out += list(index.note_counts().items())
    content = page(
        f"lapilli: {stage.name}",
        loss_section("Loss", rows),
        evaluation_section(rows),
        learning_section(rows),
        machine_section(rows),
        section("Totals", table(("", ""), [(tag("span", name), str(value)) for name, value in totals])),
        section("What trained", table(("part", "trains", "frozen", "never run"), parts)),
        section("Left out of the data", table(("what", "records"), left_out)) if left_out else join(),
        lead=f"Run folder {ready.folder.path}",
    )
    write_page(ready.folder.path / "report.html", content)


def _curve(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    # What was not finite is null in the file, and breaks the curve.
    return [(r["step"], math.nan if r[key] is None else r[key]) for r in rows]
