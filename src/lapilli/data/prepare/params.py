"""The statistics of a preparation: `data_params.json`.

Sections and names are those of Cerebras' preprocessing, so that what reads theirs reads this; what lapilli adds stands
under `lapilli`. Pictures' places are counted as what they are, not as padding, and every record that is not in the
data is counted under its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapilli.data.prepare.facts import Facts
from lapilli.data.prepare.rows import Rows
from lapilli.data.sample import Sample, Text
from lapilli.data.stamp import kind_of

FILE = "data_params.json"
FEATURES = ("text_input_ids", "loss_mask", "labels", "key_padding_mask", "token_modality_idx")


@dataclass
class Statistics:
    """Counts over some records; all are sums, so parts add up in any order. The longest is kept too."""

    records: int = 0
    samples: int = 0
    bad: int = 0
    dropped: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    image_tokens: int = 0
    supervised: int = 0
    pictures: int = 0
    with_pictures: int = 0
    longest: int = 0
    pictures_per_sample: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)
    """Samples by length: up to 64, 128, 256 ... tokens."""
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        """Count the text of one record that is in the data."""
        texts = [part.text for message in sample.messages for part in message.parts if isinstance(part, Text)]
        characters = sum(map(len, texts))
        self.characters += characters
        ascii_only = all(text.isascii() for text in texts)
        self.bytes += characters if ascii_only else sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)

    def add_rows(self, rows: Rows) -> None:
        """Count what a shard holds."""
        self.samples += len(rows.examples)
        self.tokens += len(rows.ids)
        self.image_tokens += int((~rows.text).sum())
        self.supervised += int(rows.supervised.sum())
        pictures = [len(e.images) for e in rows.examples]
        self.pictures += sum(pictures)
        self.with_pictures += sum(map(bool, pictures))
        self.longest = max(self.longest, int(rows.lengths.max(initial=0)))
        self.pictures_per_sample.update(map(str, pictures))
        self.lengths.update(str(max(64, 1 << (length - 1).bit_length())) for length in rows.lengths.tolist())

    def left_out(self, reason: str, bad: bool) -> None:
        """Count one record that is not."""
        self.bad += bad
        self.dropped += not bad
        self.reasons[kind_of(reason)] += 1

    def merge(self, other: Statistics) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif name == "longest":
                self.longest = max(self.longest, value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def as_json(self) -> dict[str, Any]:
        return {k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        values: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in value.items()}
        return cls(**values)


def data_params(
    statistics: Statistics,
    facts: Facts,
    settings: Mapping[str, Any],
    tokenizer: Any,
    shards: Sequence[Mapping[str, Any]],
    padded_length: int | None,
) -> dict[str, Any]:
    """The contents of `data_params.json`. `padded_length` is the length of each row where rows are padded."""
    s = statistics
    inputs = s.tokens - s.samples  # what is fed: the last token is predicted only
    total = s.samples * padded_length if padded_length is not None else inputs
    return {
        "setup": {"data": {"type": "local", "source": settings["sources"]}, "mode": "finetuning"},
        "processing": {
            "max_seq_length": padded_length if padded_length is not None else facts.max_length,
            "pad_id": tokenizer.pad_token_id,
            "eos_id": tokenizer.eos_token_id,
            "vocab_size": facts.vocabulary,
        },
        "dataset": {
            "is_multimodal": facts.layout is not None,
            "num_patches": facts.tokens_per_image,
            "max_num_img": settings["max_images"],
        },
        "features": list(FEATURES) if padded_length is not None else ["input_ids", "supervised"],
        "post-process": {
            "total_raw_docs": s.records,
            "raw_docs_skipped": s.bad + s.dropped,
            "n_examples": s.samples,
            "raw_chars_count": s.characters,
            "raw_bytes_count": s.bytes,
            "average_chars_per_sequence": round(s.characters / max(1, s.samples)),
            "average_bytes_per_sequence": round(s.bytes / max(1, s.samples)),
            "num_tokens": total,
            "non_pad_tokens": inputs,
            "num_pad_tokens": total - inputs,
            "loss_valid_tokens": s.supervised,
            "num_masked_tokens": total - s.supervised,
        },
        "lapilli": {
            **settings,
            "facts": facts.as_json(),
            "tokens_per_image": facts.tokens_per_image,
            "statistics": s.as_json(),
            "shards": [dict(shard) for shard in shards],
        },
    }
