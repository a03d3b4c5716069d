"""Memory of a process that answers with a base and N adapters on it: `python benchmarks/serve_adapters.py --work DIR`.

A language model of 104 million parameters with a tiny encoder is built in DIR, with adapters of random weights on it.
Each line is a fresh process that loads so many and asks each once, in bf16; resident memory counts beyond that of the
imports.
"""

import argparse
import gc
import subprocess
import sys
from pathlib import Path

ADAPTERS = 8


def build_all(folder: Path) -> None:
    import torch
    import transformers
    from tests.support.adapters import make_adapter
    from tests.support.parts import make_tokenizer, make_vision

    from lapilli.assemble.build import BuildOptions, build

    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    vision = make_vision("clip", folder / "vision")
    build(BuildOptions(language_model=str(folder / "language"), vision_encoder=str(vision)), folder / "base")
    for number in range(ADAPTERS):
        make_adapter(folder / "base", folder / f"adapter{number}", number, r=8)


def resident_bytes() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def measure(folder: Path, adapters: int, apart: bool) -> None:
    import torch

    from lapilli.generate.assistant import load, load_together

    paths = {name: folder / name for name in ["base", *(f"adapter{i}" for i in range(adapters))]}
    before = resident_bytes()
    if apart:
        assistants = {name: load(path, dtype=torch.bfloat16) for name, path in paths.items()}
    else:
        assistants = dict(load_together(paths, dtype=torch.bfloat16))
    for assistant in assistants.values():
        assistant.generate("What is it?", max_new_tokens=2)
    how = "each by itself" if apart else "together"
    print(f"base and {adapters} adapters, {how}: {(resident_bytes() - before) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--adapters", type=int, help="measure one case in this process")
    parser.add_argument("--apart", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if options.adapters is not None:
        measure(options.work, options.adapters, options.apart)
        return
    options.work.mkdir(parents=True)
    build_all(options.work)
    for adapters, apart in ((0, False), (1, False), (4, False), (8, False), (4, True)):
        command = [sys.executable, __file__, "--work", str(options.work), "--adapters", str(adapters)]
        subprocess.run([*command, *(["--apart"] if apart else [])], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
