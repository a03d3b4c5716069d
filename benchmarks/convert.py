"""Memory and time of converting, of applying a delta and of merging adapters, beside a copy of the same bytes.

    python benchmarks/convert.py [--size 7B] [--layers 32] [--folder DIR] [--steps copy,hf,...] [--json FILE]

A model of Vicuna-7B's and CLIP-L/14-336's shape is written with random numbers in float16, in LLaVA's layout: 13.5 GB,
or less with fewer `--layers`. It takes 45 GB of disk under `--folder` in all; everything is deleted at the end.

Each command runs in a process of its own. Its anonymous memory (RssAnon of /proc/PID/status, children included: what a
program really holds, without mapped files) is looked at fifty times a second, and the highest is reported. Then it runs
again with its data segment limited (RLIMIT_DATA, as `ulimit -d`), where it must still succeed. Files are put out of the
cache before every step, the copy included, and every step ends with the files on disk.

`--size 13B` and `--layers` give two sizes to calculate a third from.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lapilli.checkpoint.stream import Lazy, Tensors, held, write_folder

SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}
"""Width, inner width, heads, layers."""
VOCABULARY, RANK = 32000, 128
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 768}  # fmt: skip
STEPS = ("copy", "hf", "delta", "merge", "sample")
BLOCK = 2**24
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command with its data segment limited."""


# --- the model --------------------------------------------------------------------------------------------------------


class Random:
    """Tensors of random numbers that cost no memory until they are read: one block of numbers, turned differently."""

    def __init__(self) -> None:
        self.block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).half()
        self.made = 0

    def __call__(self, *shape: int) -> Lazy:
        self.made += 1
        turn, size = self.made * 7919 % BLOCK, torch.Size(shape).numel()

        def read() -> torch.Tensor:
            flat = torch.empty(size, dtype=torch.float16)
            for start in range(0, size, BLOCK):
                piece = flat[start : start + BLOCK]
                first = min(len(piece), BLOCK - turn)
                piece[:first] = self.block[turn : turn + first]
                piece[first:] = self.block[: len(piece) - first]
            return flat.view(shape)

        return Lazy(shape, torch.float16, "random", read)


def ones(size: int) -> Lazy:
    return held(torch.ones(size, dtype=torch.float16), "ones")


def language(random: Random, width: int, inner: int, layers: int) -> Tensors:
    made: Tensors = {"model.embed_tokens.weight": random(VOCABULARY, width)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made[f"model.layers.{i}.self_attn.{name}.weight"] = random(width, width)
        made[f"model.layers.{i}.mlp.gate_proj.weight"] = random(inner, width)
        made[f"model.layers.{i}.mlp.up_proj.weight"] = random(inner, width)
        made[f"model.layers.{i}.mlp.down_proj.weight"] = random(width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{i}.{name}.weight"] = ones(width)
    return made | {"model.norm.weight": ones(width), "lm_head.weight": random(VOCABULARY, width)}


def encoder(random: Random) -> Tensors:
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    head = "vision_model."
    places = (VISION["image_size"] // VISION["patch_size"]) ** 2 + 1
    made: Tensors = {
        f"{head}embeddings.class_embedding": random(width),
        f"{head}embeddings.patch_embedding.weight": random(width, 3, VISION["patch_size"], VISION["patch_size"]),
        f"{head}embeddings.position_embedding.weight": random(places, width),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        made |= {f"{head}{name}.weight": ones(width), f"{head}{name}.bias": random(width)}
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{head}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= {
                f"{layer}self_attn.{name}.weight": random(width, width),
                f"{layer}self_attn.{name}.bias": random(width),
            }
        made |= {f"{layer}mlp.fc1.weight": random(inner, width), f"{layer}mlp.fc1.bias": random(inner)}
        made |= {f"{layer}mlp.fc2.weight": random(width, inner), f"{layer}mlp.fc2.bias": random(width)}
        for name in ("layer_norm1", "layer_norm2"):
            made |= {f"{layer}{name}.weight": ones(width), f"{layer}{name}.bias": random(width)}
    return made


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with Vicuna's number of tokens: the bytes, and names that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{i}>" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **marks).save_pretrained(folder)


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make(root: Path, size: str, layers: int) -> None:
    """`model`: LLaVA's layout; `tower`: its encoder; `base`: a language model alone; `adapters`: a LoRA of `model`."""
    width, inner, heads, _ = SIZES[size]
    random = Random()
    text = {
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "torch_dtype": "float16", "tie_word_embeddings": False,
    }  # fmt: skip
    joined = text | {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_vision_tower": "../tower",
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "tokenizer_model_max_length": 2048,
    }  # fmt: skip
    projector = {
        "model.mm_projector.0.weight": random(width, VISION["hidden_size"]), "model.mm_projector.0.bias": random(width),
        "model.mm_projector.2.weight": random(width, width), "model.mm_projector.2.bias": random(width),
    }  # fmt: skip
    for name in ("model", "tower", "base", "adapters"):
        (root / name).mkdir()
    write_folder(root / "model", language(random, width, inner, layers) | projector)
    write_json(root / "model" / "config.json", joined)
    write_tokenizer(root / "model")
    write_folder(root / "tower", encoder(random))
    write_json(root / "tower" / "config.json", VISION | {"model_type": "clip_vision_model", "torch_dtype": "float16"})
    square = {"height": VISION["image_size"], "width": VISION["image_size"]}
    write_json(
        root / "tower" / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": square, "resample": 3,
         "size": {"shortest_edge": VISION["image_size"]}, "image_mean": [0.48145466, 0.4578275, 0.40821073],
         "image_std": [0.26862954, 0.26130258, 0.27577711]},
    )  # fmt: skip
    write_folder(root / "base", language(random, width, inner, layers))
    write_json(root / "base" / "config.json", text | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    shutil.copyfile(root / "model" / "tokenizer.json", root / "base" / "tokenizer.json")
    shutil.copyfile(root / "model" / "tokenizer_config.json", root / "base" / "tokenizer_config.json")
    write_adapters(root / "adapters", random, projector, joined, layers, width, inner)


def write_adapters(
    folder: Path, random: Random, projector: Tensors, fields: dict[str, Any], layers: int, width: int, inner: int
) -> None:
    shapes = {f"self_attn.{n}": (width, width) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    adapters: Tensors = {}
    for i in range(layers):
        for name, (out, into) in shapes.items():
            stem = f"base_model.model.model.layers.{i}.{name}"
            adapters |= {f"{stem}.lora_A.weight": random(RANK, into), f"{stem}.lora_B.weight": random(out, RANK)}
    write_folder(folder, adapters, stem="adapter_model")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.05,
             "bias": "none", "target_modules": [name.split(".")[1] for name in shapes], "fan_in_fan_out": False,
             "base_model_name_or_path": "../model"}  # fmt: skip
    write_json(folder / "adapter_config.json", about)
    write_json(folder / "config.json", fields)
    beside = {f"base_model.model.{name}": tensor.read() for name, tensor in projector.items()}
    torch.save(beside, folder / "non_lora_trainables.bin")


# --- measuring --------------------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Put the folder's files out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process and its children."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += anonymous_bytes(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def run(command: list[str], limit_bytes: int | None) -> dict[str, Any]:
    """Run a command; its seconds, its highest anonymous memory, and whether it succeeded."""

    if limit_bytes is not None:
        command = [sys.executable, "-c", LIMITED, str(limit_bytes), *command]
    began, worked, highest = time.monotonic(), processor_seconds(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            highest = max(highest, anonymous_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - began
        output.seek(0)
        said = output.read().decode(errors="replace").splitlines()
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds() - worked,
        "anonymous_bytes": highest,
        "ok": process.returncode == 0,
        "said": said[-12:],
    }


def processor_seconds() -> float:
    """What this process and those that it has waited for have used."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy the model and its encoder, the bytes that a conversion writes, down to the disk."""
    began, worked = time.monotonic(), processor_seconds()
    for folder in ("model", "tower"):
        shutil.copytree(source / folder, target / folder)
    for file in target.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return {"seconds": time.monotonic() - began, "processor_seconds": processor_seconds() - worked}


def commands(root: Path, out: Path) -> dict[str, list[str]]:
    lapilli = [sys.executable, "-m", "lapilli.cli"]
    model, base = str(root / "model"), str(root / "base")
    return {
        "hf": [*lapilli, "convert", model, str(out), "--to", "hf", "--template", "vicuna_v1", "--verify", "none"],
        "sample": [*lapilli, "convert", model, str(out), "--to", "hf", "--template", "vicuna_v1", "--verify", "sample"],
        "delta": [*lapilli, "delta", "apply", base, model, str(out)],
        "merge": [*lapilli, "merge", str(root / "adapters"), str(out), "--base", model, "--verify", "none"],
    }


def measure(root: Path, steps: list[str], limit_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    out = root / "out"
    for step in steps:
        for limited in (None,) if step == "copy" else (None, limit_bytes):
            for name in ("model", "tower", "base", "adapters"):
                forget(root / name)
            made = copy(root, out) if step == "copy" else run(commands(root, out)[step], limited)
            shutil.rmtree(out, ignore_errors=True)
            found[step if limited is None else f"{step}, limited"] = made
            show(step if limited is None else f"{step}, limited", made, found.get("copy"))
    return found


def show(step: str, made: dict[str, Any], copied: dict[str, Any] | None) -> None:
    times = f" {made['seconds'] / copied['seconds']:5.2f} times the copy" if copied and copied is not made else ""
    memory = f"  {made['anonymous_bytes'] / 1e9:5.2f} GB anonymous" if "anonymous_bytes" in made else ""
    work = f" ({made['processor_seconds']:.0f} s of processor)"
    print(
        f"{step:<16} {made['seconds']:7.1f} s{work}{memory}{times}{'' if made.get('ok', True) else '  FAILED'}",
        flush=True,
    )
    if not made.get("ok", True):
        print("\n".join(made["said"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--limit-bytes", type=int, default=1_500_000_000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    layers = chosen.layers or SIZES[chosen.size][3]
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="convert-") as folder:
        root = Path(folder)
        make(root, chosen.size, layers)
        size = sum(file.stat().st_size for name in ("model", "tower") for file in (root / name).iterdir())
        print(f"{chosen.size} wide, {layers} layers: {size / 1e9:.2f} GB", flush=True)
        found = measure(root, chosen.steps.split(","), chosen.limit_bytes)
    if chosen.json:
        write_json(chosen.json, {"size": chosen.size, "layers": layers, "bytes": size, "steps": found})


if __name__ == "__main__":
    main()
