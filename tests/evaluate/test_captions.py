"""Caption scores are coco-caption's, word for word where its tokenizer's output is known."""

import math
from collections import Counter

import pytest
from tests.support.benchmarks import open_task, reference, score, submit, write

from lapilli.base.errors import DataError
from lapilli.evaluate.caption_metrics import bleu, cider_d, longest_common, rouge_l
from lapilli.evaluate.caption_words import words

DIFFERENT = ("😀", "C++", "y'all", ":)")
"""What stands in the known captions that are split in another way."""


def test_words_are_the_treebank_tokenizers():
    known = reference("caption_words.json")
    wrong = [caption for caption, split in known if " ".join(words(caption)) != split]
    assert all(any(mark in caption for mark in DIFFERENT) for caption in wrong)
    assert len(wrong) == len(DIFFERENT) < len(known) - 40


def test_numbers_are_coco_captions():
    known = reference("caption_metrics.json")
    captions = [text.split() for text in known["captions"]]
    references = [[text.split() for text in listed] for listed in known["references"]]
    assert cider_d(captions, references) == pytest.approx(known["cider"], abs=1e-12)
    assert bleu(captions, references) == pytest.approx(known["bleu"], abs=1e-12)
    made = [rouge_l(caption, listed) for caption, listed in zip(captions, references, strict=True)]
    assert made == pytest.approx(known["rouge_l"], abs=1e-12)


def test_cider_d_of_two_pictures_by_hand():
    """One reference each; every n-gram stands in one of two documents, so weighs ln 2 times its count."""
    references = [[["a", "b", "c", "d"]], [["e", "f", "g", "h"]]]
    captions = [["a", "b", "c", "x"], ["e", "f", "g", "h"]]

    def by_hand(mine, theirs):
        total = 0.0
        for n in range(1, 5):
            a, b = (Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (mine, theirs))
            product = sum(min(a[gram], b[gram]) * b[gram] for gram in a)
            norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
            total += product / norms
        return 10 * total / 4 * math.exp(-((len(mine) - len(theirs)) ** 2) / (2 * 6**2))

    wanted = [by_hand(caption, listed[0]) for caption, listed in zip(captions, references, strict=True)]
    assert wanted == pytest.approx([10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4, 10])
    assert cider_d(captions, references) == pytest.approx(wanted)


def test_a_word_that_every_picture_has_is_worth_nothing():
    same = ["a", "dog"]
    assert cider_d([["a"], ["a"]], [[same], [same]]) == [0, 0]


def test_bleu_takes_the_closest_length_and_punishes_short_captions():
    references = [["a", "b", "c", "d", "e", "f"], ["a", "b", "c"]]
    assert bleu([["a", "b", "c"]], [references])[0] == pytest.approx(1)
    assert bleu([["a", "b"]], [references])[0] == pytest.approx(math.exp(1 - 3 / 2))


def test_longest_common_sequence():
    assert longest_common(["a", "b", "c", "d"], ["b", "x", "d", "c"]) == 2
    assert longest_common([], ["a"]) == 0


def karpathy(data, name="dataset_flickr30k.json"):
    images = [
        {
            "filename": f"{i}.jpg",
            "filepath": "val2014" if i else None,
            "imgid": i,
            "split": "test" if i < 3 else "train",
            "sentences": [{"raw": f"A dog number {i} runs."}, {"raw": f"Dog {i} in the park"}],
        }
        for i in range(4)
    ]
    write(data / name, {"images": images})


def test_karpathys_files(tmp_path):
    karpathy(tmp_path)
    job = open_task("flickr30k", tmp_path)
    assert [q.id for q in job.questions] == ["0", "1", "2"]
    assert [q.images[0].path for q in job.questions] == ["0.jpg", "val2014/1.jpg", "val2014/2.jpg"]
    assert job.questions[0].text == "<image>\nProvide a one-sentence caption for the provided image."
    answers = {"0": "A dog number 0 runs!", "1": "", "2": "Two cats"}
    scores = score(job, answers)
    assert scores.items["0"] > scores.items["2"] == scores.items["1"] == 0
    assert scores.values["cider"] == pytest.approx(100 * sum(scores.items.values()) / 3)
    assert scores.values.keys() == {"cider", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    assert scores.notes == ("1 of 3 captions have no words; they count as 0",)
    assert submit(job, {"0": " A dog\nruns ", "2": "x"}, tmp_path / "out") == [
        {"image_id": 0, "caption": "A dog runs"},
        {"image_id": 2, "caption": "x"},
    ]


def test_a_split_that_is_not_there_is_refused(tmp_path):
    karpathy(tmp_path)
    path = tmp_path / "dataset_flickr30k.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "val"'))
    with pytest.raises(DataError, match=r'has the splits train, val; options.split is "test"'):
        open_task("flickr30k", tmp_path)


def test_cocos_form_with_domains(tmp_path):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "domain": domain}
        for i, domain in enumerate(["in-domain", "in-domain", "out-domain", "out-domain", "near-domain"])
    ]
    annotations = [{"image_id": i, "caption": f"a thing {'abcd'[i]} there"} for i in range(4)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    write(path, {"images": images, "annotations": annotations})
    job = open_task("nocaps", tmp_path)
    assert job.questions[4].truth is None  # captions of its own it has none: asked, not scored
    scores = score(job, {str(i): f"a thing {'abxd'[i]} there" for i in range(4)})
    assert scores.counts["domain"] == {"in-domain": 2, "out-domain": 2}
    own = cider_d([words("a thing x there"), words("a thing d there")], [[words(f"a thing {c} there")] for c in "cd"])
    assert scores.groups["domain"]["out-domain"]["cider"] == pytest.approx(100 * sum(own) / 2)
    write(path, {"images": images[:3], "annotations": annotations})
    with pytest.raises(DataError, match=r"captions of 1 pictures that it does not list \(first: 3\)"):
        open_task("nocaps", tmp_path)
