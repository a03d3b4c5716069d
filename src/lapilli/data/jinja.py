"""Templates as Jinja, for software that knows Hugging Face's `chat_template` and not lapilli.

What is exported renders the prompt text of `Template.prompt`, letter for letter; a property test holds the two
together. Everything stands on one line, because the blanks between Jinja's tags would be text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lapilli.data.template import Template


def turns(template: Template, image_token: str) -> str:
    """The Jinja form of a template that is made of marks."""
    picture = _quoted(template.image_prefix + image_token + template.image_suffix)
    out = [_content_macro(picture, template.user_text == "drop")]
    out.append("{% if messages and messages[0]['role'] == 'system' %}")
    out.append("{% set system = content(messages[0], 'system') %}{% set turns = messages[1:] %}")
    out.append(f"{{% else %}}{{% set system = {_quoted(template.system)} %}}{{% set turns = messages %}}{{% endif %}}")
    if template.opening_answer == "drop":
        out.append("{% if turns and turns[0]['role'] == 'assistant' %}{% set turns = turns[1:] %}{% endif %}")
    keeps_system = template.user_text == "keep"
    block = f"{_quoted(template.system_prefix)} + system + {_quoted(template.system_suffix)}" if keeps_system else "''"
    out.append(f"{{% set state = namespace(block={block} if system else '', first=true) %}}")
    if template.system_place == "before":
        out.append("{{ state.block }}{% set state.block = '' %}")
    for question, answer in template.examples:
        asked = template.user_prefix + question + template.user_suffix
        said = template.answer_lead + answer + template.answer_end + template.answer_tail
        out.append(_literal(asked + template.answer_prefix + said))
    out.append("{% for message in turns %}{% if message['role'] == 'assistant' %}")
    out.append(_literal(template.answer_prefix + template.answer_lead) + "{{ content(message, 'assistant') }}")
    out.append(_literal(template.answer_end + template.answer_tail) + "{% else %}")
    first = template.user_prefix if template.first_user_prefix is None else template.first_user_prefix
    out.append(f"{{{{ {_quoted(first)} if state.first else {_quoted(template.user_prefix)} }}}}{{{{ state.block }}}}")
    out.append("{{ content(message, 'user') }}" + _literal(template.user_suffix))
    out.append("{% set state.first = false %}{% set state.block = '' %}{% endif %}{% endfor %}")
    out.append(f"{{% if add_generation_prompt %}}{_literal(template.answer_prefix)}{{% endif %}}")
    return "".join(out)


def flattening(template: Template, image_token: str) -> str:
    """A tokenizer's own Jinja, preceded by what makes lists of text and pictures the strings that it expects."""
    picture = _quoted(template.image_prefix + image_token + template.image_suffix)
    return (
        _content_macro(picture, drops_questions=False)
        + "{% set flat = namespace(messages=[]) %}{% for message in messages %}"
        + "{% set flat.messages = flat.messages + [dict(message, content=content(message, message['role']))] %}"
        + "{% endfor %}{% set messages = flat.messages %}"
        + (template.chat_template or "")
    )


def _content_macro(picture: str, drops_questions: bool) -> str:
    """`content(message, role)`: a message's text with its pictures, whether a string or a list of parts."""
    text, string = "{{ part['text'] }}", "{{ message['content'] }}"
    if drops_questions:
        text, string = (f"{{% if role == 'assistant' %}}{t}{{% endif %}}" for t in (text, string))
    return (
        "{% macro content(message, role) %}{% if message['content'] is string %}"
        + string
        + "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ "
        + picture
        + " }}{% else %}"
        + text
        + "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    )


def _literal(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A Jinja string."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f"'{text}'"
