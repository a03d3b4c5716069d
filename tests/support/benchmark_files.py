"""Every benchmark's files in small, in the layout and the formats that their authors and LLaVA's eval.zip have."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.tiny import make_picture

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COUNT = 2
"""Questions of each benchmark, unless its form asks for another number."""


HEAD = [
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"),
    *("l2-category", "comment", "split"),
]
"""Columns of MMBench's TSV files."""


def make_benchmarks(root: Path) -> Path:
    """A data folder with every task that lapilli knows, as `--data` takes it."""
    for make in (_vqa, _gqa_pope_mme, _captions, _scienceqa, _choices, _open_ended, _histology):
        make(root)
    return root


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False))


def _lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _pictures(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(folder / name, 40, 30, seed)


def _asked(image: str = "{}.jpg", suffix: str = SHORT, count: int = COUNT, **more: Any) -> list[dict[str, Any]]:
    return [
        {"question_id": i, "image": image.format(i), "text": f"What is it, {i}?{suffix}", "category": "default", **more}
        for i in range(count)
    ]


def _ten(answer: str = "a red dog") -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(10)]


def _vqa(root: Path) -> None:
    folder = root / "vqav2"
    _lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", _asked())
    _lines(folder / "llava_vqav2_mscoco_test2015.jsonl", _asked(count=COUNT + 1))
    _pictures(folder / "test2015", "0.jpg", "1.jpg", "2.jpg")
    questions = [{"question_id": 10 + i, "image_id": i, "question": "What?"} for i in range(COUNT)]
    _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    annotations = [{**q, "answers": _ten(), "answer_type": "other", "question_type": "what"} for q in questions]
    _json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    _pictures(folder / "val2014", *(f"COCO_val2014_{i:012d}.jpg" for i in range(COUNT)))
    folder = root / "vizwiz"
    _lines(folder / "llava_test.jsonl", _asked("VizWiz_test_{}.jpg"))
    _pictures(folder / "test", "VizWiz_test_0.jpg", "VizWiz_test_1.jpg")
    val = [
        {"image": f"v{i}.jpg", "question": "What?", "answers": _ten(), "answer_type": "other", "answerable": 1}
        for i in range(COUNT)
    ]
    _json(folder / "val.json", val)
    _pictures(folder / "val", "v0.jpg", "v1.jpg")
    folder = root / "textvqa"
    ocr = [
        {**one, "text": f"what is it?\nReference OCR token: A, B{SHORT}", "question_id": "p"} for one in _asked("p.jpg")
    ]
    _lines(folder / "llava_textvqa_val_v051_ocr.jsonl", ocr[:1])
    data = [{"image_id": "p", "question": "What is it?", "answers": ["a red dog"] * 10}]
    _json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    _pictures(folder / "train_images", "p.jpg")


def _gqa_pope_mme(root: Path) -> None:
    folder = root / "gqa" / "data"
    _lines(
        folder / "llava_gqa_testdev_balanced.jsonl", [{**q, "question_id": f"2{q['question_id']}"} for q in _asked()]
    )
    types = {"structural": "query", "semantic": "obj", "detailed": "x"}
    truth = {
        f"2{i}": {"answer": "dog", "isBalanced": True, "types": types, "semantic": [], "groups": {"global": "animal"}}
        for i in range(COUNT)
    }
    _json(folder / "testdev_balanced_questions.json", truth)
    _pictures(folder / "images", "0.jpg", "1.jpg")
    folder = root / "pope"
    asked = [
        {"question_id": i, "image": "COCO_0.jpg", "text": f"Is there a dog, {i}?{SHORT}", "category": category}
        for category in ("random", "popular", "adversarial")
        for i in range(COUNT)
    ]
    _lines(folder / "llava_pope_test.jsonl", asked)
    for category in ("random", "popular", "adversarial"):
        labels = [
            {
                "question_id": i + 1,
                "image": "COCO_0.jpg",
                "text": f"Is there a dog, {i}?",
                "label": "yes" if i else "no",
            }
            for i in range(COUNT)
        ]
        _lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    _pictures(folder / "val2014", "COCO_0.jpg")
    folder = root / "MME"
    pictures = folder / "MME_Benchmark_release_version" / "existence"
    _pictures(pictures, "0.jpg")
    (pictures / "0.txt").write_text("Is it? Please answer yes or no.\tYes\nIs it no? Please answer yes or no.\tNo\n")
    asked = [
        {"question_id": "existence/0.jpg", "image": "existence/0.jpg", "text": text + SHORT}
        for text in ("Is it?", "Is it no?")
    ]
    _lines(folder / "llava_mme.jsonl", asked)


def _captions(root: Path) -> None:
    for name, folder, images in (("coco", "coco-captions", "images"), ("flickr30k", "flickr30k", "flickr30k-images")):
        listed = [
            {
                "filename": f"{i}.jpg", "imgid": i, "split": "test" if i < COUNT else "train",
                "sentences": [{"raw": f"A red dog number {i}."}],
            }
            for i in range(COUNT + 1)
        ]  # fmt: skip
        _json(root / folder / f"dataset_{name}.json", {"images": listed})
        _pictures(root / folder / images, "0.jpg", "1.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": "near-domain"} for i in range(COUNT)]
    annotations = [{"image_id": i, "caption": f"A cat, {i}."} for i in range(COUNT)]
    _json(root / "nocaps" / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations})
    _pictures(root / "nocaps" / "images", "0.jpg", "1.jpg")


def _scienceqa(root: Path) -> None:
    problem = {
        "question": "Which?", "choices": ["run", "blue"], "answer": 1, "hint": "", "task": "closed choice",
        "grade": "grade2", "subject": "natural science", "topic": "x", "category": "x", "skill": "x",
        "lecture": "It is.", "solution": "So it is.", "split": "test",
    }  # fmt: skip
    problems = {"1": {**problem, "image": None}, "2": {**problem, "image": "image.png"}}
    _json(root / "scienceqa" / "problems.json", problems)
    _json(root / "scienceqa" / "pid_splits.json", {"test": ["1", "2"], "train": []})
    _pictures(root / "scienceqa" / "images" / "test", "2/image.png")


def _choices(root: Path) -> None:
    picture = base64.b64encode(make_picture(root / "picture.png", 40, 30).read_bytes()).decode()
    for folder, name in (("mmbench", "mmbench_dev_20230712.tsv"), ("mmbench_cn", "mmbench_dev_cn_20231003.tsv")):
        mmbench_file(root / folder, [mmbench_row(i, picture) for i in range(COUNT)], name)
    folder = root / "seed_bench"
    _lines(folder / "llava-seed-bench.jsonl", _asked("SEED-Bench-image/{}.jpg", f"\nA. x\nB. y\nC. z\nD. w{LETTER}"))
    _pictures(folder / "SEED-Bench-image", "0.jpg", "1.jpg")
    records = [
        {
            "question_id": i, "question_type_id": 1, "data_type": "image", "answer": "B", "question": "What is it?",
            **{f"choice_{letter}": letter for letter in "abcd"},
        }
        for i in range(COUNT)
    ]  # fmt: skip
    _json(folder / "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": records})
    for name in ("llvisionqa_dev", "llvisionqa_test", "质衡-问答-验证集", "质衡-问答-测试集"):
        asked = [
            {"img_path": f"{i}.jpg", "question": "Sharp?", "candidates": ["yes", "no"], "type": 0, "concern": 1}
            | ({} if "test" in name or "测试" in name else {"correct_ans": "no"})
            for i in range(COUNT)
        ]
        _json(root / "qbench" / f"{name}.json", asked)
    _pictures(root / "qbench" / "images_llvisionqa", "0.jpg", "1.jpg")


def _open_ended(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    asked = [{**one, "category": "conv"} for one in _asked(suffix="")]
    _lines(folder / "questions.jsonl", asked)
    _lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": "A dog."} for i in range(COUNT)])
    _lines(folder / "context.jsonl", [{"image": f"{i}.jpg", "caption": "A red dog."} for i in range(COUNT)])
    _pictures(folder / "images", "0.jpg", "1.jpg")
    folder = root / "mm-vet"
    _lines(folder / "llava-mm-vet.jsonl", _asked(suffix=""))
    truth = {
        f"v1_{i}": {"question": "What?", "answer": "a red dog", "capability": ["rec", "ocr"]} for i in range(COUNT)
    }
    _json(folder / "mm-vet.json", truth)
    _pictures(folder / "images", "0.jpg", "1.jpg")


def _histology(root: Path) -> None:
    folder = root / "quiltvqa"
    for name in ("quiltvqa", "quiltvqa_red", "quiltvqa_nored"):
        _lines(folder / f"{name}_test_wo_ans.jsonl", _asked(suffix=""))
        truth = [
            {"id": 0, "answer": "a red nucleus", "answer_type": "OPEN"},
            {"id": 1, "answer": "Yes, it is.", "yes_no_answer": "yes", "answer_type": "CLOSED"},
        ]
        _json(folder / f"{name}_test_w_ans.json", truth)
    for images in ("images", "red_circle"):
        _pictures(folder / images, "0.jpg", "1.jpg")
    folder = root / "pvqa"
    _lines(folder / "pvqa_test_wo_ans.jsonl", _asked(suffix=""))
    truth = [
        {"id": 0, "answer": "a red dog", "answer_type": "OPEN"},
        {"id": 1, "answer": "no", "answer_type": "CLOSED"},
    ]
    _json(folder / "pvqa_test_w_ans.json", truth)
    _pictures(folder / "images" / "test", "0.jpg", "1.jpg")
    turns = [{"from": "human", "value": "What?\nA:x\nB:y\nC:z\nD:w"}, {"from": "gpt", "value": "B"}]
    asked = [{"id": i, "image": f"{i}.jpg", "conversations": turns} for i in range(COUNT)]
    _json(root / "pmcvqa" / "pmcvqa_test_wo_ans.json", asked)
    _pictures(root / "pmcvqa" / "pmcvqa_images", "0.jpg", "1.jpg")


def mmbench_row(
    index: int,
    picture: str,
    answer: str = "B",
    hint: str = "",
    options: tuple[str, ...] = ("a cat", "two dogs", "ice", ""),
    category: str = "naming",
    **more: Any,
) -> dict[str, Any]:
    """A question of MMBench's TSV file; `picture` is base64."""
    made: dict[str, Any] = {"index": index, "question": "What is it?", "hint": hint, "answer": answer}
    made |= {"category": category, **dict(zip("ABCD", options, strict=True))}
    return {**made, "image": picture, "source": "web", "l2-category": "coarse", "comment": "", "split": "dev"} | more


def mmbench_file(
    folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "mmbench_dev_20230712.tsv", head: Sequence[str] = HEAD
) -> Path:
    """Write the rows; returns the folder."""
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, head, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder
