"""The image token: looked up or added, never an id written in code.

New rows of the embedding and of the output layer start as the mean of the rows that were there, so that a new token
is as likely as an average one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from lapilli.base.errors import ModelError
from lapilli.data.template import IM_END, IM_START

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Vocabulary:
    """What adding tokens did to the tokenizer."""

    image_token_id: int
    added: tuple[str, ...]
    size: int
    """Smallest number of embedding rows that has a row for every token."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, *, im_start_end: bool, image_token: str = IMAGE_TOKEN) -> Vocabulary:
    """Make the image token (and the tokens around it) single tokens of the tokenizer.

    A pad token is needed for batches; a tokenizer without one gets its end token for it, which masks keep apart.
    """
    wanted = [image_token, *([IM_START, IM_END] if im_start_end else [])]
    before = tokenizer.get_vocab()
    missing = [t for t in wanted if t not in before]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in wanted], special_tokens=True)
    ids: Any = tokenizer.encode(image_token, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"the tokenizer cuts its own token {image_token} into {len(ids)} pieces; choose another name")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Vocabulary(ids[0], tuple(missing), max(tokenizer.get_vocab().values()) + 1)


def make_room(language_model: PreTrainedModel, vocabulary: Vocabulary, tokens: list[int], *, resize: bool) -> int:
    """Give every token a row and set the rows of new `tokens` to the mean; return the number of rows added.

    Raises ModelError if rows are missing and the model can't or must not be resized.
    """
    embeddings: Any = language_model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if not resize:
        # The image token itself is never looked up; every other token needs its row.
        homeless = [t for t in tokens if t >= rows and t != vocabulary.image_token_id]
        if homeless:
            raise ModelError(
                f"the language model has {rows} embedding rows and no room for token {homeless[0]}; "
                "build without --keep-vocabulary to add rows"
            )
        tokens = [t for t in tokens if t < rows]
    elif vocabulary.size > rows:
        try:
            language_model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
        except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"{type(language_model).__name__} has no room for the image token: {rows} embedding rows, "
                f"{vocabulary.size} needed, and it can't be resized ({error})"
            ) from error
    grown = language_model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    new = sorted({*tokens, *range(rows, grown)})
    known = min(rows, *new) if new else rows
    with torch.no_grad():
        tables: dict[int, Any] = {
            id(t.weight): t.weight
            for t in (language_model.get_input_embeddings(), language_model.get_output_embeddings())
            if t is not None
        }  # type: ignore[union-attr]
        for table in tables.values():
            if new:
                table[new] = table[:known].float().mean(0).to(table.dtype)
    return grown - rows
