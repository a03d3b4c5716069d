# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""Part two, made openly: a byte-level BPE tokenizer and a small Llama, trained on text alone.

The texts are sums, and questions about a picture that is *described in words*. So the language model knows the words
and how to answer before it ever gets a picture, as Vicuna does, and the two stages teach it to see.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapilli.data.sample import IGNORE
from lapilli.quickstart.questions import Dialogue, random_dialogue

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
        tie_word_embeddings=True,  # answers are mostly words of the description: tied, copying is learned sooner
    )


def encode(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """A dialogue as ids and labels: begun by `<s>`, each answer and the `</s>` after it supervised, nothing else."""
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for given, answer in dialogue.turns():
        asked = tokenizer(given, add_special_tokens=False)["input_ids"]
        answered = tokenizer(answer + EOS, add_special_tokens=False)["input_ids"]
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    return ids, labels


def pad(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids and labels as two (B, T) tensors, filled up on the right."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in rows], batch_first=True, padding_value=fill)
        for i, fill in enumerate((pad_id, IGNORE))
    )
    return ids, labels


def train_language(
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Train a small Llama on `steps` batches of fresh dialogues and save it with its tokenizer to `out`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = LlamaForCausalLM(llama_config(tokenizer))
    peak = 1e-3
    warmup = max(1, steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warmup, 0.5 * (1 + float(np.cos(np.pi * k / steps)))),
    )
    for step in range(1, steps + 1):
        ids, labels = pad([encode(random_dialogue(rng), tokenizer) for _ in range(batch_size)], tokenizer.pad_token_id)
        # Filled up on the right under causal attention, the places that matter never see the filling.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0 or step == steps:
            say(f"language model  step {step}/{steps}  loss {loss:.3f} per answer token")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
