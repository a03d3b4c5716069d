"""Answers per second beside the original's `model_vqa.py` and beside transformers' `generate`, in one run.

    python benchmarks/generate.py --llava-repo PATH --llava-python PATH [--questions 128] [--pictures 8] [--rounds 1]

Two random models, whose answers are cut after four tokens, are asked one question about each of `--questions`
pictures, then 30 questions about each of `--pictures` pictures, as GQA does: `small` (27M parameters), whose time is
matrix products, and `tiny` (0.4M), whose time is everything else. All decode greedily in
fp32 from the same weights; time runs from the loaded model to the last answer, opening of the pictures included.
transformers gets its best batch size of several. The original is given fp32 weights too, and its calls for a GPU are
answered by the CPU; half precision, its default, is slower there. Answers must be equal to transformers' but where the
two best tokens lie within 1e-4, which is counted.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from workload import WORDS, gemm_rate, make_language_model, make_pictures, make_vision_encoder

import lapilli
from lapilli.generate.decoding import Decoding

TOKENIZER = Path(__file__).parents[1] / "tests" / "reference" / "tokenizer" / "tokenizer.model"
PER_PICTURE = 30
TOKENS = 4
CLOSE = 1e-4
SIZES = {"small": ((512, 8), (256, 6)), "tiny": ((64, 2), (32, 2))}
"""Width and layers of language model and vision encoder."""
SUFFIX = "\nAnswer the question using a single word or phrase."

ORIGINAL = """
import sys, time, types, torch
torch.Tensor.cuda = lambda self, *a, **k: self
torch.Tensor.half = lambda self: self.float()
from llava.eval import model_vqa
load = model_vqa.load_pretrained_model
def on_cpu(*arguments):
    global began
    tokenizer, model, processor, context = load(*arguments, device_map="cpu", device="cpu")
    model = model.float()
    model.get_vision_tower().float()
    generate = model.generate
    model.generate = lambda *a, **k: generate(*a, **{**k, "max_new_tokens": MAX_NEW_TOKENS})
    began = time.perf_counter()
    return tokenizer, model, processor, context
model_vqa.load_pretrained_model = on_cpu
model, images, questions, answers = sys.argv[1:]
model_vqa.eval_model(types.SimpleNamespace(
    model_path=model, model_base=None, image_folder=images, question_file=questions, answers_file=answers,
    conv_mode="vicuna_v1", num_chunks=1, chunk_idx=0, temperature=0, top_p=None, num_beams=1))
print("seconds", time.perf_counter() - began)
"""


def make_model(work: Path, size: str) -> None:
    """A joined model, in the three layouts."""
    language, vision = SIZES[size]
    make_language_model(work / "language-model", TOKENIZER, *language)
    make_vision_encoder(work / "vision-encoder", *vision)
    command = [sys.executable, "-m", "lapilli.cli"]
    parts = ["--vision-encoder", "vision-encoder", "--language-model", "language-model"]
    run = lambda *a: subprocess.run([*command, *a], cwd=work, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    run("build", *parts, "--out", "model", "--keep-vocabulary")
    run("convert", "model", "llava-v1.5-small", "--to", "llava", "--verify", "none")
    run("convert", "model", "hf", "--to", "hf", "--verify", "none")


def make_questions(path: Path, pictures: list[str], each: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    made = [
        {"question_id": i, "image": picture, "text": " ".join(rng.choices(WORDS, k=rng.randint(5, 12))) + "?" + SUFFIX}
        for i, picture in enumerate(picture for picture in pictures for _ in range(each))
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    return made


def run_original(work: Path, questions: Path, repo: Path, python: str) -> tuple[float, list[str]]:
    answers = work / f"{questions.stem}-original.jsonl"
    script = ORIGINAL.replace("MAX_NEW_TOKENS", str(TOKENS))
    arguments = [work / "llava-v1.5-small", work / "images", questions, answers]
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        cwd=arguments[0],  # it looks for its vision tower from where it is started
        env={**os.environ, "PYTHONPATH": str(repo)},
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the original failed:\n{done.stderr[-3000:]}")
    seconds = float(done.stdout.split("seconds")[-1])
    return seconds, [json.loads(line)["text"] for line in answers.read_text().splitlines()]


def run_transformers(work: Path, questions: list[dict[str, Any]], batch: int) -> tuple[float, list[str]]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(work / "hf", backend="pil")
    processor.tokenizer.padding_side = "left"
    model: Any = LlavaForConditionalGeneration.from_pretrained(work / "hf", dtype=torch.float32).eval()
    answers: list[str] = []
    began = time.perf_counter()
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + q["text"]}]}] for q in part
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        pictures = [PIL.Image.open(work / "images" / q["image"]).convert("RGB") for q in part]
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return time.perf_counter() - began, answers


def run_lapilli(assistant: Any, work: Path, questions: list[dict[str, Any]]) -> tuple[float, list[str], list[float]]:
    """Seconds, answers, and how far the two best tokens are apart where they are closest, for each answer."""
    decoding = Decoding(max_new_tokens=TOKENS, logprobs=2)
    opened = lru_cache(maxsize=4)(assistant.processor.picture)  # as `lapilli evaluate` does it
    began = time.perf_counter()
    items = (
        (i, assistant.processor.prompt("<image>\n" + q["text"], [opened(work / "images" / q["image"])]), decoding)
        for i, q in enumerate(questions)
    )
    found = dict(assistant.engine.stream(items, batch_size=32))
    seconds = time.perf_counter() - began
    gaps = [min((t.top[0][1] - t.top[1][1] for t in found[i].logprobs), default=1.0) for i in range(len(questions))]
    return seconds, [found[i].text for i in range(len(questions))], gaps


def compare(name: str, answers: list[str], ours: list[str], gaps: list[float]) -> str:
    differ = [i for i, (a, b) in enumerate(zip(answers, ours, strict=True)) if a != b]
    close = sum(gaps[i] < CLOSE for i in differ)
    said = f"{name}: {len(ours) - len(differ)} of {len(ours)} answers equal, {close} of the others within {CLOSE}"
    far = [gaps[i] for i in differ if gaps[i] >= CLOSE]
    return f"{said}, the rest within {max(far):.1e}" if far else said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava-repo", type=Path, help="a checkout of the original LLaVA")
    parser.add_argument("--llava-python", default=sys.executable, help="interpreter that can run it")
    parser.add_argument("--out", type=Path, default=Path("benchmark-run"))
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32 {gemm_rate():.0f} GFLOP/s")
    for size in options.sizes:
        measure_size(size, options)


def measure_size(size: str, options: argparse.Namespace) -> None:
    work = options.out.resolve() / size
    work.mkdir(parents=True)
    make_model(work, size)
    names = make_pictures(work / "images", max(options.questions, options.pictures))
    assistant = lapilli.load(work / "model", template="vicuna_v1")
    for title, pictures, each in (
        ("one question per picture", names[: options.questions], 1),
        (f"{PER_PICTURE} questions per picture", names[: options.pictures], PER_PICTURE),
    ):
        file = work / f"{each}.jsonl"
        measure(f"{size}, {title}: ", assistant, work, file, make_questions(file, pictures, each), options)


def measure(
    title: str, assistant: Any, work: Path, file: Path, questions: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Run all systems on the same questions, and print answers per second and how many answers are equal."""
    runs: dict[str, Callable[[], tuple[float, list[str]]]] = {}
    if options.llava_repo:
        repo = options.llava_repo.resolve()
        runs["original"] = lambda: run_original(work, file, repo, options.llava_python)
    sizes = {size: run_transformers(work, questions[: max(4, size)], size)[0] / max(4, size) for size in (1, 4, 8)}
    best = min(sizes, key=lambda size: sizes[size])
    runs[f"transformers, batch {best}"] = lambda: run_transformers(work, questions, best)
    times: dict[str, list[float]] = {}
    answers: dict[str, list[str]] = {}
    ours: list[str] = []
    gaps: list[float] = []
    for _ in range(options.rounds):
        for name, run in runs.items():
            seconds, answers[name] = run()
            times.setdefault(name, []).append(seconds)
        seconds, ours, gaps = run_lapilli(assistant, work, questions)
        times.setdefault("lapilli", []).append(seconds)
    print(f"\n{title}{len(questions)} questions, answers of {statistics.mean(map(len, ours)):.0f} letters")
    mine = statistics.median(times["lapilli"])
    for name, taken in times.items():
        seconds = statistics.median(taken)
        print(f"  {name:24}{len(questions) / seconds:8.2f} answers/s   lapilli is {seconds / mine:5.2f} times as fast")
    for name, said in answers.items():
        print(f"  {compare(name, said, ours, gaps)}")


if __name__ == "__main__":
    main()
