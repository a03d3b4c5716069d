"""A model with everything around it: pictures and questions in, answers out.

This is what `lapilli.load` returns. It is thin: the processor prepares, the engine generates, the template says what
text stands around a question.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lapilli.assemble import load as assemble
from lapilli.assemble.load import Loaded
from lapilli.assemble.opening.quantised import is_quantised
from lapilli.assemble.qlora import load_quantised
from lapilli.assemble.quantise import check_bitsandbytes
from lapilli.assemble.shared import Holding, load_several
from lapilli.assemble.source import model_folder
from lapilli.base.errors import ModelError
from lapilli.generate.conversation import Chat, Picture
from lapilli.generate.decoding import Answer, Decoding
from lapilli.generate.engine import Engine
from lapilli.generate.processor import Processor
from lapilli.model.quantised import Held

log = logging.getLogger(__name__)


@dataclass
class Assistant(Loaded):
    """A loaded model that answers. `processor` prepares its inputs, `engine` makes its answers."""

    def __post_init__(self) -> None:
        self.processor = Processor(self)
        self.engine = Engine(self, self.processor)

    def generate(
        self,
        messages: Chat,
        images: Sequence[Picture] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Callable[[str], None] | None = None,
        seed: int | None = None,
    ) -> str:
        """Answer one conversation: a question, or messages with "role" and "content" that end with a question.

        `images` fill the places that `<image>` or image parts mark, in order; without marks they stand in front of the
        first question. `temperature` 0 is greedy. `stop` adds to the template's own stop strings. `stream` is called
        with each new piece of text. Blanks at the answer's ends are cut off. An answer cut short is a warning in the
        log; `answer` returns it as a field. Raises DataError for a conversation or picture that can't be used,
        ModelError for a prompt that is longer than the model's context.
        """
        decoding = Decoding(max_new_tokens, temperature, top_p, _strings(stop), seed)
        answer = self.answer(messages, images, decoding, stream=stream)
        _say_if_full([answer])
        return answer.text

    def answer(
        self,
        messages: Chat,
        images: Sequence[Picture] | None = None,
        decoding: Decoding | None = None,
        *,
        stream: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """As `generate`, with tokens and the reason of the answer's end; `cancelled` is asked after every token."""
        prompt = self.processor.prompt(messages, images)
        return self.engine.generate(
            [prompt],
            decoding,
            on_text=None if stream is None else lambda _i, piece: stream(piece),
            cancelled=None if cancelled is None else lambda _i: cancelled(),
        )[0]

    def generate_batch(
        self,
        conversations: Sequence[tuple[Chat, Sequence[Picture] | None]],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        batch_size: int = 8,
    ) -> list[str]:
        """Answer several (messages, images), up to `batch_size` at a time; the answers come in their order.

        Each answer is the one its conversation gets alone, sampled ones with a seed included.
        """
        prompts = [self.processor.prompt(messages, images) for messages, images in conversations]
        decoding = Decoding(max_new_tokens, temperature, top_p, _strings(stop), seed)
        answers = self.engine.generate(prompts, decoding, batch_size=batch_size)
        _say_if_full(answers)
        return [a.text for a in answers]


def load(
    path: Path | str,
    base: Path | str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    template: str | None = None,
    quantise: Held | None = None,
) -> Assistant:
    """Load any model folder, run folder, or adapter folder with its `base`.

    `dtype` is float32 on CPU and bfloat16 elsewhere unless given; `template` replaces the folder's own. With `quantise`
    the language model's linear layers are held in 4 (`nf4`) or 8 bits (`int8`) by bitsandbytes. Raises ModelError
    naming what is wrong with the folder, or a device that is not there.
    """
    device = _checked(device)
    if quantise is None:
        return Assistant(**vars(assemble.load(path, base, device=device, dtype=dtype, template=template)))
    return Assistant(**vars(_load_quantised(path, base, device, dtype, template, quantise)))


def load_together(
    paths: Mapping[str, Path | str],
    base: Path | str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    template: str | None = None,
    quantise: Held | None = None,
    gpus: int = 1,
) -> dict[str, Assistant]:
    """`load` several models by name. Adapters over one base, and the base itself, hold its weights once.

    `base` is for those of them that need one. Each may be asked in a thread of its own. What is shared is logged. With
    `gpus` the layers of each are dealt out to so many. Raises ModelError as `load` does, and for too few GPUs.
    """
    split = _split(device, gpus, quantise)
    if len(paths) == 1 and not split:
        return {name: load(path, base, device, dtype, template, quantise) for name, path in paths.items()}
    device = split[0] if split else _checked(device)
    if quantise is not None:
        check_bitsandbytes()
    how = Holding(device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16), quantise, split)
    loaded = load_several(paths, how, base=base, template=template)
    return {name: Assistant(**vars(one)) for name, one in loaded.items()}


def _split(device: str | torch.device, gpus: int, quantise: Held | None) -> tuple[torch.device, ...]:
    """The GPUs that layers are dealt out to; none where the model stays on one device."""
    if gpus < 2:
        return ()
    if torch.cuda.device_count() < gpus:
        raise ModelError(f"{gpus} GPUs are asked for, this machine has {torch.cuda.device_count()}")
    if torch.device(device) != torch.device("cuda"):
        raise ModelError(f"{gpus} GPUs are asked for, and device {device}; name the device cuda, or leave it out")
    if quantise is not None:
        raise ModelError(f"{gpus} GPUs are asked for: layers in {quantise} are held on one; leave one of the two out")
    return tuple(torch.device("cuda", number) for number in range(gpus))


def _checked(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        raise ModelError(f"device {device}: {str(error).splitlines()[0]}") from error
    return device


def _load_quantised(
    path: Path | str,
    base: Path | str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    template: str | None,
    held: Held,
) -> Loaded:
    if is_quantised(model_folder(path)):
        raise ModelError(f"{path}: its weights are quantised already; load it as it is")
    check_bitsandbytes()
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    loaded = load_quantised(path, held, dtype, device, base=base, template=template, rest=dtype)
    loaded.model.to(device).eval()  # type: ignore[arg-type]
    return loaded


def _say_if_full(answers: Sequence[Answer]) -> None:
    """An answer shorter than asked for is said; where text alone is returned, the log is the place."""
    full = [a.note for a in answers if a.finish == "context"]
    if full:
        log.warning("%s%s", full[0], f" ({len(full)} of {len(answers)} answers)" if len(answers) > 1 else "")


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
