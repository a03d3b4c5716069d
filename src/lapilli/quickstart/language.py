"""Part two, made openly: a byte-level BPE tokenizer and a small Llama, trained on text alone.

The texts are captions, sums, and questions about a picture that is *described in words*. So the language model knows
the words and how to answer before it ever gets a picture, as Vicuna does, and the two stages teach it to see.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 512
CONTEXT_TOKENS = 512


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that, like Llama's, begins every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT_TOKENS
    )


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def token_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, row_tokens: int) -> torch.Tensor:
    """Texts end to end, each begun by `<s>` and ended by `</s>`, cut into rows: (rows, row_tokens) ids."""
    eos = tokenizer.eos_token_id
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, eos)]
    rows = len(stream) // row_tokens
    return torch.tensor(stream[: rows * row_tokens]).view(rows, row_tokens)


def train_language(
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    seed: int,
    batch_rows: int,
    say: Callable[[str], None],
    row_tokens: int = 128,
) -> None:
    """Train a small Llama for one pass over `texts` and save it with its tokenizer to `out`."""
    torch.manual_seed(seed)
    rows = token_rows(texts, tokenizer, row_tokens)
    model = LlamaForCausalLM(llama_config(tokenizer))
    steps, peak = len(rows) // batch_rows, 3e-3
    warmup = max(1, steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warmup, 0.5 * (1 + float(np.cos(np.pi * k / steps)))),
    )
    for step in range(1, steps + 1):
        batch = rows[(step - 1) * batch_rows : step * batch_rows]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0 or step == steps:
            say(f"language model  step {step}/{steps}  loss {loss:.3f} per token")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
