"""Pictures per second and core beside the original LLaVA and transformers, in one run on one machine.

    python benchmarks/data.py [--llava-repo PATH --llava-python PATH] [--rounds 40] [--size 640x480] [--json FILE]

Every engine reads the same JPEG files, pads them to a square, resizes to 336 and normalises, with one thread in a
process of its own; they take turns, eight pictures each. Reported are medians over the rounds, by processor time and by
the clock, after a turn that is not counted, and how far the pixels of each are from the original's. `check` is `lapilli
data check --decode header` over the same files. Without `--llava-repo` the original is left out; `--llava-python` is an
interpreter with the packages it needs.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image

EDGE = 336
TURN = 8
"""Pictures that an engine makes when it is its turn: few, so that a slow second of the machine hits all of them."""
CHECKED = 512
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OURS = ("exact", "fast", "exact-uint8", "fast-uint8")
"""Backends; `-uint8` stops at what a data worker sends on, since pictures are normalised on the device."""

Paths = Sequence[Path]
Engine = Callable[[Paths], Any]
"""Files in, one normalised (1, 3, 336, 336) float32 tensor each out; one at a time, as the original's Dataset does."""


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Smooth pictures of many colours as JPEG files of quality 90."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        paths.append(folder / f"{i:05d}.jpg")
        small.resize(size, PIL.Image.Resampling.BILINEAR).save(paths[-1], quality=90)
    return paths


# --- engines: each runs in a child process, the original under an interpreter of its own ------------------------------


def ours(name: str) -> Engine:
    from lapilli.base.layout import ImageLayout
    from lapilli.data.image import ImageSpec, normalise, open_image, to_tiles
    from lapilli.data.sample import Image

    backend, _, stops = name.partition("-")
    spec = ImageSpec(backend=backend, mode="pad", shortest_edge=EDGE, crop=(EDGE, EDGE), mean=MEAN, std=STD)
    layout = ImageLayout(mode="pad", tile_height=EDGE, tile_width=EDGE, grid_height=24, grid_width=24)

    def run(paths: Paths) -> Any:
        pictures = (open_image(Image(path=path.name), path.parent) for path in paths)
        tiles = (to_tiles(picture, spec, layout) for picture in pictures)
        return [tile if stops else normalise(tile, spec) for tile in tiles]

    return run


def original(repo: str) -> Engine:
    sys.path.insert(0, repo)
    from llava.mm_utils import process_images
    from transformers import CLIPImageProcessor

    size = {"shortest_edge": EDGE}
    crop = {"height": EDGE, "width": EDGE}
    processor = CLIPImageProcessor(size=size, crop_size=crop, image_mean=MEAN, image_std=STD)
    config = SimpleNamespace(image_aspect_ratio="pad")

    def run(paths: Paths) -> Any:
        return [process_images([PIL.Image.open(path).convert("RGB")], processor, config) for path in paths]

    return run


def transformers_pil() -> Engine:
    from transformers import LlavaImageProcessorPil

    size = {"shortest_edge": EDGE}
    crop = {"height": EDGE, "width": EDGE}
    processor = LlavaImageProcessorPil(size=size, crop_size=crop, image_mean=MEAN, image_std=STD, do_pad=True)

    def run(paths: Paths) -> Any:
        pictures = (PIL.Image.open(path).convert("RGB") for path in paths)
        return [processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures]

    return run


def checked(paths: Paths, folder: Path, repeats: int) -> Callable[[], int]:
    """`data check --decode header` over every file `repeats` times under another name."""
    from lapilli.data.doctor.examine import examine
    from lapilli.recipe.schema import Source

    records = []
    for i in range(repeats):
        for path in paths:
            name = f"{i:04d}-{path.name}"
            (folder / name).write_bytes(path.read_bytes())
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Stone {name}."}]
            records.append({"id": name, "image": name, "conversations": turns})
    (folder / "check.json").write_text(json.dumps(records))
    source = Source(path=str(folder / "check.json"), images=str(folder))

    def run() -> int:
        found = examine([source], decode="header", workers=0, stream=io.StringIO())
        assert found.ok, list(found.findings.in_order())[:3]
        return len(found.usable)

    return run


def child(engine: str, folder: Path, repo: str) -> None:
    """Answer every line on standard input with the seconds that one round took."""
    import torch

    torch.set_num_threads(1)
    paths = sorted(folder.glob("*.jpg"))
    if engine == "check":
        with tempfile.TemporaryDirectory() as place:
            answer(checked(paths, Path(place), CHECKED // len(paths)))
        return
    run = original(repo) if engine == "original" else transformers_pil() if engine == "transformers" else ours(engine)
    np.save(folder / f"{engine}.npy", torch.cat(run(paths)).numpy())

    turns = cycle(range(0, len(paths), TURN))

    def some_files() -> int:
        first = next(turns)
        for path in paths[first : first + TURN]:
            run([path])
        return len(paths[first : first + TURN])

    answer(some_files)


def answer(work: Callable[[], int]) -> None:
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        clock, cpu = time.perf_counter(), time.process_time()
        count = work()
        print(json.dumps([count, time.process_time() - cpu, time.perf_counter() - clock]), flush=True)


# --- the parent ------------------------------------------------------------------------------------------------------


def start(engine: str, python: str, folder: Path, repo: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(
        [python, __file__, "--child", engine, "--folder", str(folder), "--llava-repo", repo],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    raise SystemExit(f"{engine}: failed to start")


def turn(process: subprocess.Popen[str]) -> tuple[int, float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    count, cpu, clock = json.loads(process.stdout.readline())
    return count, cpu, clock


def apart(folder: Path, engine: str, reference: str) -> str:
    """How far an engine's normalised pixels are from the reference's, as parts of 1 in the picture's own range."""
    scale = np.array(STD, dtype=np.float64).reshape(3, 1, 1)
    a, b = (np.load(folder / f"{name}.npy").astype(np.float64) * scale for name in (engine, reference))
    difference = np.abs(a - b)
    return f"max {difference.max() * 255:.4f}/255, mean {difference.mean() * 255:.5f}/255"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava-repo", default="")
    parser.add_argument("--llava-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--json", default="")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, Path(given.folder), given.llava_repo)
        return
    width, height = map(int, given.size.split("x"))
    engines = ["original"] if given.llava_repo else []
    engines += ["transformers", *OURS, "check"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = write_pictures(folder, given.pictures, (width, height))
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        print(f"{len(paths)} pictures of {width} x {height}, {kilobytes:.0f} kB each, Pillow {PIL.__version__}, "
              f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")  # fmt: skip
        running = {
            name: start(name, given.llava_python if name == "original" else sys.executable, folder, given.llava_repo)
            for name in engines
        }
        times: dict[str, list[tuple[int, float, float]]] = {name: [] for name in engines}
        for _ in range(given.rounds):
            for name, process in running.items():
                times[name].append(turn(process))
        for process in running.values():
            process.communicate()
        report(times, folder, given.json)


def report(times: dict[str, list[tuple[int, float, float]]], folder: Path, out: str) -> None:
    rates = {
        name: [statistics.median(count / taken[kind] for count, *taken in rounds) for kind in (0, 1)]
        for name, rounds in times.items()
    }
    base = rates.get("original") or rates["transformers"]
    reference = "original" if "original" in rates else "transformers"
    print(f"{'':>14}{'pictures/s of cpu':>20}{'ms':>8}{'times':>8}{'pictures/s of clock':>22}   from {reference}")
    for name, (cpu, clock) in rates.items():
        distance = "" if name in (reference, "check") or name.endswith("uint8") else apart(folder, name, reference)
        factor = "" if name == "check" else f"{cpu / base[0]:.2f}"
        print(f"{name:>14}{cpu:20.0f}{1000 / cpu:8.2f}{factor:>8}{clock:22.0f}   {distance}")
    if out:
        Path(out).write_text(json.dumps({name: {"cpu": cpu, "clock": clock} for name, (cpu, clock) in rates.items()}))


if __name__ == "__main__":
    main()
