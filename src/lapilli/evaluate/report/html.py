"""The report as one page that needs nothing but itself: tables, then questions with every model's answer, and filters.

The filters are the page's only script; without it every question that the page holds is simply there. What they are
set to stands behind the page's address (`#verdict=wrong&text=dog`), so that it can be sent on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lapilli.base.html import Html, data_uri, escape, page, section, table, tag
from lapilli.base.progress import size_text
from lapilli.evaluate.report import tables
from lapilli.evaluate.report.choose import VERDICTS, Case, Chosen, Reply
from lapilli.evaluate.report.gather import Gathered, models_of
from lapilli.evaluate.report.pictures import Thumbnails
from lapilli.evaluate.report.tables import Grid
from lapilli.evaluate.report.words import answer_text, cut, limits, notes, read_text, score_text

_MANY_ROWS = 12
_STYLE = """
body { max-width: 76rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } details { margin: .6rem 0; }
summary { cursor: pointer; } #filters { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center;
  position: sticky; top: 0; z-index: 1; background: var(--back); padding: .6rem 0;
  border-bottom: 1px solid var(--rule); } #filters[hidden] { display: none; }
#filters select, #filters input { font: inherit; color: var(--ink); background: var(--panel); max-width: 14rem;
  border: 1px solid var(--rule); border-radius: 6px; padding: .25rem .5rem; } #filters input { flex: 1 1 10rem; }
.case { display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; background: var(--panel); border-radius: 8px;
  padding: 1rem; margin: .8rem 0; } .case[hidden] { display: none; } .case img { max-width: 100%; border-radius: 4px;
  background: #fff; display: block; margin-bottom: .4rem; } .case table { width: 100%; } .case td:first-child {
  white-space: nowrap; } .text { white-space: pre-wrap; overflow-wrap: anywhere; } .case > div { min-width: 0; }
.chip { display: inline-block; border: 1px solid var(--rule); border-radius: 999px; padding: 0 .6rem; font-size: .8rem;
  color: var(--soft); margin-right: .3rem; } @media (max-width: 40rem) { .case { grid-template-columns: 1fr; } }
"""
_SCRIPT = """
const cases = [...document.querySelectorAll('.case')].map(node => ({node, ...JSON.parse(node.dataset.case),
  words: node.textContent.toLowerCase()}));
const field = name => document.getElementById('filter-' + name);
const names = ['task', 'model', 'verdict', 'group', 'text'];
function fits(one, want) {
  const verdicts = want.model === '' ? one.verdicts : [one.verdicts[Number(want.model)]];
  return (want.task === '' || one.task === want.task)
    && (want.model === '' || verdicts[0] !== null)
    && (want.verdict === '' || (want.verdict === 'differ' ? one.differ : verdicts.includes(want.verdict)))
    && (want.group === '' || one.groups.includes(want.group))
    && want.text.toLowerCase().split(/\\s+/).every(word => one.words.includes(word));
}
function apply() {
  const want = Object.fromEntries(names.map(name => [name, field(name).value]));
  let shown = 0;
  for (const one of cases) { const yes = fits(one, want); one.node.hidden = !yes; shown += yes; }
  document.getElementById('filter-count').textContent = shown + ' of ' + cases.length + ' questions';
}
function keep() {
  const set = names.filter(name => field(name).value !== '').map(name => [name, field(name).value]);
  history.replaceState(null, '', '#' + new URLSearchParams(set));
}
function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of names) field(name).value = given.get(name) ?? '';
  apply();
}
for (const name of names) field(name).addEventListener('input', () => { apply(); keep(); });
addEventListener('hashchange', restore);
document.getElementById('filters').hidden = false;
restore();
"""


def render(
    tasks: Sequence[Gathered], chosen: Sequence[Chosen], differences: Sequence[Grid | None], thumbnails: Thumbnails
) -> str:
    """The whole page."""
    models = models_of(tasks)
    cards = [
        _card(case, task, models, thumbnails) for task, own in zip(tasks, chosen, strict=True) for case in own.cases
    ]
    said = [*limits(tasks, chosen), *_picture_notes(thumbnails)]
    known = notes(tasks)
    return page(
        "lapilli: evaluation",
        section("Scores", _table(tables.summary(tasks))),
        section("Questions", _table(tables.counts(tasks))),
        section("Notes", _listed(known)) if known else "",
        *(_task_section(task, difference) for task, difference in zip(tasks, differences, strict=True)),
        section("Answers", _listed(said), _filters(tasks, chosen, models) if cards else "", *cards),
        lead="95 % intervals are of questions drawn with replacement.",
        style=_STYLE,
        script=_SCRIPT if cards else "",
    )


def _picture_notes(thumbnails: Thumbnails) -> list[str]:
    said = [f"{thumbnails.shown:,} pictures, {size_text(thumbnails.bytes)}"]
    if thumbnails.over:
        said.append(
            f"{thumbnails.over:,} pictures are left out: the page holds {size_text(thumbnails.max_bytes)} of them"
        )
    if thumbnails.faults:
        first = next(iter(thumbnails.faults.values()))
        said.append(f"{len(thumbnails.faults):,} pictures can't be shown, the first: {first}")
    return said


def _listed(lines: Sequence[str]) -> Html:
    return tag("ul", *(tag("li", line) for line in lines), class_="soft")


def _table(grid: Grid) -> Html:
    return table(grid.header, grid.rows)


def _task_section(task: Gathered, difference: Grid | None) -> Html:
    parts: list[Html] = []
    for grid in (*tables.values(task), difference, *tables.groups(task)):
        if grid is None:
            continue
        body = _table(grid)
        if len(grid.rows) > _MANY_ROWS:
            body = tag("details", tag("summary", f"{len(grid.rows)} rows"), body)
        parts += [tag("h3", grid.title), body]
    return section(f"{task.title} ({task.name})", *parts)


def _filters(tasks: Sequence[Gathered], chosen: Sequence[Chosen], models: Sequence[str]) -> Html:
    kinds: dict[str, set[str]] = {}
    for own in chosen:
        for case in own.cases:
            for kind, group in case.groups.items():
                kinds.setdefault(kind, set()).add(group)
    grouped = [
        tag("optgroup", *(tag("option", group, value=_key(kind, group)) for group in sorted(found)), label=kind)
        for kind, found in kinds.items()
    ]
    verdicts = [name for name in VERDICTS if any(r.verdict == name for o in chosen for c in o.cases for r in c.replies)]
    different = [tag("option", "models differ", value="differ")] if len(models) > 1 else []
    return tag(
        "div",
        _select("task", "every task", [tag("option", task.name, value=task.name) for task in tasks]),
        _select("model", "every model", [tag("option", name, value=str(i)) for i, name in enumerate(models)]),
        _select("verdict", "right or wrong", [*(tag("option", name, value=name) for name in verdicts), *different]),
        _select("group", "every category", grouped),
        Html('<input id="filter-text" type="search" placeholder="words" aria-label="words" autocomplete="off">'),
        tag("span", "", id="filter-count", class_="soft", role="status"),
        id="filters",
        hidden="",
    )


def _select(name: str, everything: str, options: Sequence[Html]) -> Html:
    first = tag("option", everything, value="")
    return tag("select", first, *options, id=f"filter-{name}", aria_label=name, autocomplete="off")


def _key(kind: str, group: str) -> str:
    return f"{kind}={group}"


def _card(case: Case, task: Gathered, models: Sequence[str], thumbnails: Thumbnails) -> Html:
    by_model = {reply.model: reply for reply in case.replies}
    facts = {
        "task": case.task,
        "verdicts": [by_model[model].verdict if model in by_model else None for model in models],
        "differ": case.stratum == "differ",
        "groups": [_key(kind, group) for kind, group in case.groups.items()],
    }
    pictures: list[Html] = []
    for image in case.images:
        file = thumbnails.add(image, task.root)
        name = image.path or "picture"
        shown = tag("p", f"{name}: not shown", class_="soft") if file is None else _picture(name, file)
        pictures.append(shown)
    choices = [tag("div", f"{chr(ord('A') + i)}. {choice}") for i, choice in enumerate(case.choices[:26])]
    expected = tag("p", tag("span", "expected: ", class_="soft"), cut(case.expected)) if case.expected else ""
    replies = table(("model", "answer", "read as", "score"), [_reply(reply) for reply in case.replies])
    chips = [tag("span", f"{kind}: {group}", class_="chip") for kind, group in case.groups.items()]
    about = tag("p", tag("span", f"{case.task}, {case.id}", class_="soft"))
    question = tag("p", cut(case.text), class_="text")
    right = tag("div", about, question, *choices, expected, replies, *chips)
    return tag("article", tag("div", *pictures), right, class_="case", data_case=json.dumps(facts))


def _picture(name: str, file: bytes) -> Html:
    return Html(f'<img alt="{escape(name)}" src="{data_uri(file)}" loading="lazy">')


def _reply(reply: Reply) -> tuple[object, ...]:
    colour = {"right": "good", "wrong": "bad"}.get(reply.verdict, "soft")
    answer = tag("span", answer_text(reply), class_="soft" if reply.text is None else "text")
    if reply.said is not None:
        said = tag("details", tag("summary", "the judge's reply"), tag("p", cut(reply.said), class_="text"))
        answer = tag("div", answer, said)
    return reply.model, answer, read_text(reply), tag("b", score_text(reply), class_=colour)
