"""Captions to words, near to the Penn Treebank tokenizer (Stanford's) that the published caption scores use.

Written from its observed output, for English captions: it agrees on ordinary sentences, and may part ways on what
captions rarely have (faces of punctuation, odd abbreviations, clipped words such as 'tis). Lower case; the marks that
coco-caption drops are dropped.
"""

from __future__ import annotations

import re

_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|rd|ft|prof|rev|gen|col|sgt|lt|capt|inc|co|corp|ltd|jan|feb|mar|apr|aug|"
    "sept|sep|oct|nov|dec"
)
_WORD = re.compile(
    rf"""
      (?:https?://|www\.)\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+       # addresses
    | [#@][a-z]\w*                                                  # tags
    | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)
    | [a-z](?:\.[a-z])+\.?(?!\w)                                    # u.s.a.
    | 'n' | '\d0s\b                                                 # rock 'n' roll, the '90s
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)              # words that are two
    | [^\W\d_]+?(?=n't\b)
    | (?:o'clock|ma'am)\b
    | n't\b | '(?:s|re|ve|ll|d|m)\b                                 # it 's, they 're
    | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s|am|pm)?(?![\w-])            # 1,000 10:30 3/4 2nd
    | [a-z]{{1,2}}&[a-z]\b                                           # at&t
    | \w+(?:[-/.]\w+)*
    | \.\.\. | -- | ``|'' | [?!]+ | \S
    """,
    re.VERBOSE,
)

_ALIKE = str.maketrans({"’": "'", "‘": "`", "“": "``", "”": "''", "–": "--", "—": "--", "…": "...", "€": "$", "£": "#"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def words(caption: str) -> list[str]:
    """The words of a caption, lower case, without the punctuation that coco-caption leaves out.

    Brackets stay, as `-lrb-` and so on: coco-caption's list has them in capitals, which its tokenizer does not write.
    """
    text = caption.lower().replace("\n", " ").translate(_ALIKE).replace('"', "''")
    found = (match[0] for match in _WORD.finditer(text))
    return [_BRACKETS.get(word, word) for word in found if word not in _DROPPED]
