"""Conversations per second and core, and memory, of `lapilli data prepare`; nothing is compared with the original.

    python benchmarks/data_prepare.py [--records 20000] [--processes 1] [--kind instruct] [--rounds 3] [--tokenizer DIR]

A record is one conversation without a picture in LLaVA's JSON, made of random words: 20,000 different ones, the n-th
drawn as often as 1/n, as in natural text. After 20,000 records the same conversations come again under new ids.

    instruct   one exchange of 5 to 12 and 12 to 28 words, template v1 with its system text
    caption    one exchange of 5 to 12 and 8 to 16 words, template v1 with its system text
    two-turn   two exchanges, each as those of `instruct`

The tokenizer is SentencePiece BPE of Llama's kind with 2,000 pieces; a model's own makes fewer tokens of a word.
Rates are by processor time of all processes, reading JSON and writing HDF5 included; `tokenizer alone` is
`tokenizers.Tokenizer.encode_batch` on the rendered texts, which prepare needs only for words that are new. Memory is
that of prepare alone, a process started anew: the highest resident set of its main process, and the highest sum of all
processes' proportional sets, looked at twice a second.
"""

import argparse
import io
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from lapilli.base.layout import ImageLayout
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageSpec
from lapilli.data.prepare.job import prepare
from lapilli.data.read.llava import read
from lapilli.data.template import Span, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.recipe.schema import Source

TOKENIZER = Path(__file__).parents[1] / "tests" / "reference" / "tokenizer"
KINDS = {"instruct": (1, 28), "caption": (1, 16), "two-turn": (2, 28)}
"""Exchanges, and the most words of an answer; the fewest are as many less as makes the docstring's range."""
FEWEST = {28: 12, 16: 8}
TEMPLATE = "v1"
WORDS = 20_000
DIFFERENT = 20_000
ALONE_RECORDS = 4096
LOOKS_PER_SECOND = 2


def write_json(path: Path, records: int, kind: str) -> None:
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(WORDS)]
    weights = list(accumulate(1 / n for n in range(1, WORDS + 1)))
    exchanges, most = KINDS[kind]

    def turn(speaker: str, fewest: int, most: int, end: str) -> dict[str, str]:
        drawn = rng.choices(words, cum_weights=weights, k=rng.randint(fewest, most))
        return {"from": speaker, "value": " ".join(drawn).capitalize() + end}

    bodies = []
    for _ in range(min(records, DIFFERENT)):
        turns = []
        for _ in range(exchanges):
            turns += [turn("human", 5, 12, "?"), turn("gpt", FEWEST[most], most, ".")]
        bodies.append(json.dumps(turns))
    with open(path, "w") as file:
        for i in range(records):
            file.write(("[" if i == 0 else ",\n") + f'{{"id": "{i:09d}", "conversations": {bodies[i % DIFFERENT]}}}')
        file.write("]\n")


# --- in processes of their own ----------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_prepare(path: Path, out: Path, tokenizer: str, processes: int) -> dict[str, float]:
    layout = ImageLayout(mode="square", tile_height=336, tile_width=336, grid_height=24, grid_width=24)
    encoder = Encoder(load_tokenizer(tokenizer), get_template(TEMPLATE), layout, "<unk>", max_length=2048)
    began, clock = cpu_seconds(), time.perf_counter()
    spec = ImageSpec(size=(336, 336))
    done = prepare([Source(path=str(path))], encoder, spec, out, processes=processes, stream=io.StringIO())
    counted = done.statistics
    assert counted.samples == counted.records
    return {
        "cpu": cpu_seconds() - began,
        "clock": time.perf_counter() - clock,
        "records": counted.samples,
        "tokens": counted.tokens / counted.samples,
        "characters": counted.characters / counted.samples,
    }


def measure_tokenizer(path: Path, tokenizer: str) -> dict[str, float]:
    """Seconds of `encode_batch` on some of the records, rendered."""
    template, loaded = get_template(TEMPLATE), load_tokenizer(tokenizer)
    backend: Any = loaded.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    rendered = (template.training_spans(sample) for sample in islice(read(path), ALONE_RECORDS))
    texts = ["".join(span.text for span in spans if isinstance(span, Span)) for spans in rendered]
    began = cpu_seconds()
    for i in range(0, len(texts), 256):
        backend.encode_batch(texts[i : i + 256], add_special_tokens=False)
    return {"cpu": cpu_seconds() - began, "records": len(texts)}


# --- the parent -------------------------------------------------------------------------------------------------------


def started(path: Path, options: argparse.Namespace, child: str, out: Path) -> tuple[dict[str, float], float, float]:
    """What a child measured, the highest resident set of its main process and of all its processes together, bytes."""
    arguments = ["--child", child, "--path", path, "--out", out, "--tokenizer", options.tokenizer]
    arguments += ["--processes", options.processes]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    main_peak = sum_peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            main_peak = max(main_peak, memory(process.pid, "status", "VmHWM"))
            sum_peak = max(sum_peak, sum(memory(one, "smaps_rollup", "Pss") for one in family(process.pid)))
            time.sleep(1 / LOOKS_PER_SECOND)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{child}: failed")
    return json.loads(said), main_peak, sum_peak


def family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def memory(pid: int, file: str, field: str) -> float:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) * 1024.0 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, default="instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default=str(TOKENIZER))
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "prepare":
        print(json.dumps(measure_prepare(options.path, options.out, options.tokenizer, options.processes)))
    elif options.child:
        print(json.dumps(measure_tokenizer(options.path, options.tokenizer)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "chat.json"
        write_json(path, options.records, options.kind)
        rates, bounds = [], []
        for turn in range(options.rounds):
            found, main_peak, sum_peak = started(path, options, "prepare", Path(place) / f"out-{turn}")
            alone, _, _ = started(path, options, "tokenizer", Path(place))
            rates.append(found["records"] / found["cpu"])
            bounds.append(alone["records"] / alone["cpu"])
            print(
                f"{options.kind}: {found['records']:,} records, {found['tokens']:.0f} tokens and "
                f"{found['characters']:.0f} characters each, {options.processes} processes: {rates[-1]:,.0f} records/s "
                f"per core ({found['records'] / found['clock']:,.0f} by the clock), tokenizer alone {bounds[-1]:,.0f}; "
                f"memory {main_peak / 1e6:.0f} MB, all processes {sum_peak / 1e6:.0f} MB",
                flush=True,
            )
        print(f"median {statistics.median(rates):,.0f} records/s per core, tokenizer alone "
              f"{statistics.median(bounds):,.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
