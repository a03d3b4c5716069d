"""A conversation as a page for people: HTML that holds its pictures and needs nothing else, or Markdown beside them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image

from lapilli.base.html import Html, data_uri, page, tag
from lapilli.data.sample import IMAGE_PLACEHOLDER

_WIDEST = 1024
"""Pixels of a picture's longer side on the page."""
_STYLE = """
article { margin: 1.2rem 0; } article > div { padding: .7rem .9rem; border-radius: 8px; overflow-wrap: anywhere;
  white-space: pre-wrap; } .asked { background: var(--panel); margin-left: 3rem; } .answered { margin-right: 3rem; }
.asked img { max-width: 100%; max-height: 24rem; display: block; border-radius: 4px; }
"""


@dataclass(frozen=True)
class Said:
    """A question with `<image>` at each of its pictures, each with its name, and the answer."""

    question: str
    answer: str
    pictures: Sequence[tuple[str, PIL.Image.Image]]


def as_html(title: str, system: str | None, talk: Sequence[Said]) -> str:
    """One file, in which pictures larger than 1,024 pixels are shown smaller. What was said is never markup."""
    parts = [tag("p", system, class_="soft")] if system else []
    for said in talk:
        pictures = iter(said.pictures)
        asked: list[Html] = []
        for number, text in enumerate(said.question.split(IMAGE_PLACEHOLDER)):
            if number:
                name, picture = next(pictures)
                asked.append(tag("figure", _shown(picture), tag("figcaption", name.rpartition("/")[2])))
            if text.strip():
                asked.append(tag("span", text.strip()))
        questions, answer = tag("div", *asked, class_="asked"), tag("div", said.answer, class_="answered")
        parts.append(tag("article", questions, answer))
    return page(title, *parts, style=_STYLE)


def as_markdown(title: str, system: str | None, talk: Sequence[Said]) -> str:
    """Pictures are named by their files; answers stand as the model wrote them, which may be Markdown themselves."""
    blocks = [f"# {title}"] + ([f"System: {system}"] if system else [])
    for said in talk:
        question = said.question
        for name, _ in said.pictures:
            label = name.rpartition("/")[2].replace("[", "").replace("]", "")
            question = question.replace(IMAGE_PLACEHOLDER, f"![{label}](<{name}>)", 1)
        quoted = "\n".join(f"> {line}".rstrip() for line in question.splitlines())
        blocks += [quoted, said.answer]
    return "\n\n".join(blocks) + "\n"


def _shown(picture: PIL.Image.Image) -> Html:
    small = picture.convert("RGB")
    small.thumbnail((_WIDEST, _WIDEST))
    made = io.BytesIO()
    small.save(made, "JPEG", quality=88)
    return Html(f'<img alt="" src="{data_uri(made.getvalue())}">')
