"""`lapilli judge`: a judge model's scores for answers, and the table of them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lapilli.cli.judge_summary import Summary, spread, summary

if TYPE_CHECKING:
    from pathlib import Path

    from lapilli.evaluate.judge.items import Item
    from lapilli.evaluate.judge.run import Judged


class _Judge(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] != ["summary"]:
            args = spread(args, frozenset({"-a", "--answers", "--answer-list"}))
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Judge, add_completion=False, rich_markup_mode=None)
app.command(cls=Summary)(summary)


@app.callback(invoke_without_command=True)
def judge(
    context_: typer.Context,
    questions: Annotated[
        str | None,
        typer.Option("--questions", "--question", "-q", metavar="FILE", help="Questions: question_id, text, category."),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(
            "--answers",
            "--answer-list",
            "-a",
            metavar="A B",
            help="Two answers files, the reference first; one with --task.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", "-c", metavar="FILE", help="What the judge reads in place of the pictures."),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules", "--rule", "-r", metavar="FILE", help="The original's rule.json. Default: our own rules."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "--out", "-o", metavar="FILE", help="Reviews are appended there.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Judge answers to a task instead: llava-bench, mm-vet, your own.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="The task's data folder.")] = None,
    files: Annotated[
        list[str] | None, typer.Option(metavar="PART=PATH", help="Another place for one of the task's files.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="text, visual, bench, quilt or grade. Default: as the context's fields tell.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="DIR", help="Send each question's picture from there, to judges that see.")
    ] = None,
    both_orders: Annotated[
        bool, typer.Option("--both-orders", help="Ask a second time with the answers swapped, and average.")
    ] = False,
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint.")] = "https://api.openai.com/v1",
    model: Annotated[str, typer.Option("--model", "-m", "--eval-engine", help="The judge.")] = "gpt-4",
    key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the key; none sends no key.")
    ] = "OPENAI_API_KEY",
    temperature: Annotated[str, typer.Option(help="A number, or none to send none.")] = "0.2",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 1024,
    limit_field: Annotated[
        str, typer.Option(help="What the endpoint calls it: max_tokens or max_completion_tokens.")
    ] = "max_tokens",
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests under way at a time.")] = 4,
    requests_per_minute: Annotated[float | None, typer.Option(min=0.01, help="Not more than so many.")] = None,
    attempts: Annotated[int, typer.Option(min=1, max=20, help="Tries for each request.")] = 6,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a whole reply.")] = 120.0,
    max_wait: Annotated[float, typer.Option(min=0, help="Longest Retry-After in seconds that is waited for.")] = 600.0,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price of a million tokens written.")] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE", help='JSON of model to {"in": ..., "out": ...}, per million tokens.')
    ] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="Stop before more than so much could be spent.")] = None,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask again what was answered without readable scores.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate, ask nothing.")] = False,
) -> None:
    """Have a judge model score answers. What was asked already is not asked again; killed, the same command goes on."""
    if context_.invoked_subcommand is not None:
        return
    from lapilli.base.errors import RecipeError, RunError
    from lapilli.evaluate.judge import prompt, run, spending
    from lapilli.evaluate.judge.endpoint import Endpoint, Patience, check_url, read_key
    from lapilli.evaluate.judge.items import answers_name
    from lapilli.evaluate.judge.results import forget_judged, write_judged
    from lapilli.evaluate.judge.reviews import Store
    from lapilli.evaluate.results import RESULTS

    if output is None:
        raise RecipeError("--output: name the file that reviews are written to")
    if limit_field not in ("max_tokens", "max_completion_tokens"):
        raise RecipeError(f'--limit-field "{limit_field}": must be max_tokens or max_completion_tokens')
    items, name, root = _items(questions, answers or [], context, rules, task, data, files or [], style)
    asking = prompt.Asking(model, _temperature(temperature), max_tokens, limit_field, images)
    asked = prompt.requests(items, asking, both_orders)
    if both_orders and all(item.graded for item in items):
        raise RecipeError("--both-orders: grades are given to one answer at a time")
    if images is not None and all(item.image is None for item in items):
        raise RecipeError(f"--images {images}: no question names a picture")
    price = spending.choose_price(model, price_in, price_out, prices, max_cost is not None)
    settings = run.Settings(concurrency, requests_per_minute, price, max_cost, ask_again)
    store = Store(output)
    check_url(url, None)
    key = None if dry_run else read_key(key_env, url)
    for line in spending.in_words(model, run.preview(asked, asking, settings, store)):
        typer.echo(line, err=True)
    if dry_run:
        return
    about = {"url": url, "model": model, "temperature": asking.temperature, "max_tokens": max_tokens}
    about |= _about(questions, answers or [], context, rules, task, items)
    forget_judged(store.folder)
    patience = Patience(attempts, timeout, max_wait_seconds=max_wait)
    made = run.judge(asked, asking, Endpoint(url, key, patience), settings, store, about)
    _report(made)
    whole = not made.failed and made.ended is None
    if whole:
        model_name = answers_name((answers or [])[-1], task and name.removesuffix("-judged"))
        about_model = {"name": model_name, "judge": model}
        write_judged(store.path, store.folder, task=name, model=about_model, items=items, root=images or root)
        typer.echo(
            f"wrote {store.folder / RESULTS}; `lapilli compare` and `lapilli report` take {store.folder}", err=True
        )
    if made.signal is not None:
        raise typer.Exit(128 + signal.Signals[made.signal].value)
    if not whole:
        left = len(made.failed) + made.unasked
        raise RunError(f"{made.ended or 'not every request was answered'}: {left} of {made.requests} requests have no "
                       "reply; the same command asks them again")  # fmt: skip


def _items(
    questions: str | None,
    answers: list[str],
    context: str | None,
    rules: str | None,
    task: str | None,
    data: str | None,
    files: list[str],
    style: str | None,
) -> tuple[list[Item], str, Path | None]:
    """What there is to judge, what its results are called, and the folder of its pictures where a task names one."""
    from lapilli.base.errors import RecipeError
    from lapilli.cli.evaluate import open_named
    from lapilli.evaluate.judge.items import read_items, task_items
    from lapilli.evaluate.judge.results import REVIEWED
    from lapilli.evaluate.judge.rules import load_rules

    known = load_rules(rules)
    if task is None:
        if questions is None or not answers:
            raise RecipeError("name --questions and --answers A B, or --task NAME and --answers FILE")
        return read_items(questions, answers, known, context=context, style=style), REVIEWED, None
    if questions is not None or context is not None:
        raise RecipeError("--task brings its own questions and contexts; --files PART=PATH names others")
    if len(answers) != 1:
        raise RecipeError(f"--answers: name one file of answers to task {task}, not {len(answers)}")
    (job,) = open_named([task], data, files, ("official",), asking=False)
    return task_items(job.task.name, job.questions, answers[0], known, style), f"{job.task.name}-judged", job.root


def _temperature(text: str) -> float | None:
    from lapilli.base.errors import RecipeError

    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise RecipeError(f'--temperature "{text}": must be a number from 0 to 2, or none')
    return value


def _about(
    questions: str | None,
    answers: list[str],
    context: str | None,
    rules: str | None,
    task: str | None,
    items: list[Item],
) -> dict[str, Any]:
    """What settings.json says the reviews depend on."""
    from dataclasses import asdict
    from pathlib import Path

    from lapilli import __version__
    from lapilli.evaluate.files import digests

    named = {"questions": questions, "context": context, "rules": rules}
    named |= {f"answers{number}": path for number, path in enumerate(answers, 1)}
    used = {item.category or item.style: asdict(item.rule) for item in items}
    paths = {part: Path(path) for part, path in named.items() if path is not None}
    return {"lapilli": __version__, "task": task, "style": items[0].style, "files": digests(paths), "rules": used}


def _report(made: Judged) -> None:
    typer.echo(f"{made.answered:,} asked, {made.known:,} answered before, {made.retries:,} retries", err=True)
    cost = "" if made.spent is None else f", cost {made.spent:.4f}"
    typer.echo(f"all runs with this output: {made.read:,} tokens read, {made.written:,} written{cost}", err=True)
    if made.doubtful:
        typer.echo(f"note: {made.doubtful} attempts may or may not have been paid for; they count as paid", err=True)
    for reason, count in made.unreadable.most_common():
        typer.echo(
            f"note: {count} replies without scores: {reason}; they are in no mean (--ask-again asks again)", err=True
        )
    for request, reason in made.failed[:3]:
        typer.echo(f"note: {request.name}: {reason}", err=True)
    typer.echo(f"wrote {made.path}; `lapilli judge summary {made.path}` prints its table", err=True)
