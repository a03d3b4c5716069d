"""One page, complete in itself, that shows conversations as they will be trained.

Nothing is fetched and nothing runs but the browser's own styles: a token's id appears when the mouse rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lapilli.data.sample import IGNORE
from lapilli.data.show import Drawing, Glyph, Slot, visible

_STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --faint: #6e7781; --page: #ffffff; --card: #f6f8fa;
  --line: #d0d7de; --learnt: #1a7f37; --learnt-bed: #dafbe1; --hover: #ffd33d; --slot: #0969da; --slot-bed: #ddf4ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #8b949e; --page: #0d1117; --card: #161b22;
  --line: #30363d; --learnt: #7ee787; --learnt-bed: #12361f; --hover: #9e6a03; --slot: #79c0ff; --slot-bed: #0c2d4d; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem 4rem; color: var(--ink); background: var(--page);
  font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
p { color: var(--faint); margin: .2rem 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 1.2rem 0; padding: 1rem; }
article h2 { font-size: 1rem; margin: 0 0 .4rem; display: flex; justify-content: space-between; gap: 1rem; }
article h2 small { color: var(--faint); font-weight: normal; white-space: nowrap; }
.note { color: #9a6700; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0;
  font: 13.5px/1.7 ui-monospace, Menlo, Consolas, monospace; color: var(--faint); }
.text b { font-weight: 600; color: var(--learnt); background: var(--learnt-bed); border-radius: 2px; }
.text i { font-style: normal; }
.text b:hover, .text i:hover { background: var(--hover); color: var(--ink); }
.slot { display: inline-block; padding: 0 .6rem; border-radius: 6px; border: 1px solid var(--slot);
  color: var(--slot); background: var(--slot-bed); }
.bar { height: 4px; border-radius: 2px; background: var(--line); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--learnt); }
"""


def page(drawings: Iterable[Drawing], title: str, facts: Sequence[str] = ()) -> Iterator[str]:
    """The page in pieces, one per conversation, so that a long one need not be held in memory."""
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n"
    )
    yield "".join(f"<p>{escape(fact)}</p>\n" for fact in facts)
    yield '<p class="text"><b>learnt by the model</b> given, not learnt <span class="slot">picture</span></p>\n'
    for drawing in drawings:
        yield _article(drawing)
    yield "</body></html>\n"


def _article(drawing: Drawing) -> str:
    learnt, total = int((drawing.labels != IGNORE).sum()), len(drawing.labels)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in drawing.notes)
    body = "".join(_slot(item) if isinstance(item, Slot) else _glyph(item) for item in drawing.items)
    return (
        f"<article><h2>{escape(str(drawing.id))} <small>{escape(drawing.counts)}</small></h2>"
        f'<div class="bar"><span style="width:{100 * learnt / max(1, total):.1f}%"></span></div>'
        f'{notes}<div class="text">{body}</div></article>\n'
    )


def _glyph(glyph: Glyph) -> str:
    tag = "b" if glyph.supervised else "i"
    text = escape(visible(glyph.text))
    if glyph.supervised:
        text = text.replace("\n", "⏎\n")
    return f'<{tag} title="{" ".join(map(str, glyph.ids))}">{text}</{tag}>'


def _slot(slot: Slot) -> str:
    return f'<span class="slot">▦ {escape(visible(slot.caption))}</span>'
