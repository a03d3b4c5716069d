"""Opening an indexed data file in several processes, as the ranks of a run do.

    python benchmarks/data_open.py [--records 665000] [--processes 8]

Writes LLaVA JSON of about 1.5 KB per record (text only: pictures would measure the disk), indexes it once with two
worker processes, then opens it in several processes at a time. Memory is what a process holds beyond what it held
before it opened the data: its own pages and its share of those it has in common with the others.
"""

import argparse
import io
import json
import multiprocessing
import random
import re
import shutil
import time
from pathlib import Path

from lapilli.base.layout import ImageLayout
from lapilli.data.check import Corpus, index
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageSpec
from lapilli.data.template import get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.recipe.schema import Source

TOKENIZER = Path(__file__).parents[1] / "tests" / "reference" / "tokenizer"
WORDS = ("red", "car", "left", "of", "tree", "why", "stands", "there", "old", "under", "two", "birds")


def write_json(path: Path, records: int) -> None:
    rng = random.Random(0)
    with open(path, "w") as file:
        for i in range(records):
            turns = [{"from": ("human", "gpt")[k % 2], "value": " ".join(rng.choices(WORDS, k=55))} for k in range(6)]
            file.write(("[" if i == 0 else ",\n") + json.dumps({"id": f"{i:09d}", "conversations": turns}))
        file.write("]\n")


def make_encoder() -> Encoder:
    tokenizer = load_tokenizer(TOKENIZER)
    layout = ImageLayout(mode="square", tile_height=336, tile_width=336, grid_height=24, grid_width=24)
    return Encoder(tokenizer, get_template("vicuna_v1"), layout, "<unk>", max_length=4096)


def open_index(path: Path, cache: Path, encoder: Encoder, workers: int = 0) -> Corpus:
    spec = ImageSpec(size=(336, 336))
    return index([Source(path=str(path))], encoder, spec, cache=cache, workers=workers, stream=io.StringIO())


def private_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE).group(1)) * 1024  # type: ignore[union-attr]


def opened(path: Path, cache: Path, ready, results) -> None:
    encoder = make_encoder()
    ready.wait()
    before, started = private_bytes(), time.perf_counter()
    corpus = open_index(path, cache, encoder)
    seconds = time.perf_counter() - started
    for i in range(0, len(corpus), max(1, len(corpus) // 1000)):
        assert corpus.samples[i].sample.messages
    results.put((seconds, private_bytes() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmark-run-open"))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    path, cache = options.out / "chat.json", options.out / "index"
    write_json(path, options.records)
    time.sleep(2.5)  # the hash of a file that has just been written is not remembered
    encoder = make_encoder()
    started = time.perf_counter()
    open_index(path, cache, encoder, workers=2)
    print(f"{path.stat().st_size / 1e9:.2f} GB, {options.records:,} records")
    print(f"indexed once in {time.perf_counter() - started:.0f} s (2 processes)")
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(options.processes), context.Queue()
    processes = [context.Process(target=opened, args=(path, cache, ready, results)) for _ in range(options.processes)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    print(
        f"opened in {options.processes} processes at a time: at most {max(s for s, _ in found):.2f} s and "
        f"{max(b for _, b in found) / 2**20:.0f} MiB each"
    )


if __name__ == "__main__":
    main()
