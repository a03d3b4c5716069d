"""The readers that task files name: a benchmark's files to its questions."""

from lapilli.evaluate import (
    captions,
    gqa,
    mmbench,
    mme,
    open_ended,
    own,
    pmc,
    pope,
    qbench,
    quilt,
    scienceqa,
    seed,
    vqa_files,
)
from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Reader

READERS: dict[str, Entry[Reader]] = {
    "own": Entry(own.read, own.READ_OPTIONS),
    "scienceqa": Entry(scienceqa.read, scienceqa.READ_OPTIONS),
    "llava": Entry(vqa_files.read_llava),
    "vqav2": Entry(vqa_files.read_vqav2, vqa_files.VQAV2_OPTIONS),
    "vizwiz": Entry(vqa_files.read_vizwiz, vqa_files.VIZWIZ_OPTIONS),
    "textvqa": Entry(vqa_files.read_textvqa, vqa_files.TEXTVQA_OPTIONS),
    "gqa": Entry(gqa.read, gqa.OPTIONS),
    "pope": Entry(pope.read),
    "mme": Entry(mme.read),
    "captions": Entry(captions.read, captions.READ_OPTIONS),
    "mmbench": Entry(mmbench.read, mmbench.READ_OPTIONS),
    "seed": Entry(seed.read),
    "qbench": Entry(qbench.read, qbench.READ_OPTIONS),
    "open_ended": Entry(open_ended.read),
    "mm_vet": Entry(open_ended.read_mmvet),
    "quilt": Entry(quilt.read, quilt.READ_OPTIONS),
    "pmc": Entry(pmc.read, pmc.READ_OPTIONS),
}
