"""The writers of submission files that task files name: questions and answers to what a benchmark's server takes."""

from lapilli.evaluate import captions, gqa, mmbench, open_ended, qbench, seed, vqa_files
from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Submission

SUBMISSIONS: dict[str, Entry[Submission]] = {
    "vqav2": Entry(vqa_files.submit_vqav2),
    "vizwiz": Entry(vqa_files.submit_vizwiz),
    "gqa": Entry(gqa.submit),
    "captions": Entry(captions.submit),
    "mmbench": Entry(mmbench.submit),
    "seed": Entry(seed.submit),
    "qbench": Entry(qbench.submit),
    "mm_vet": Entry(open_ended.submit_mmvet),
}
