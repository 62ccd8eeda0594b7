"""A tiny random decoder on disk with a real byte-level tokenizer, and tiny prompted batches."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from families import FAMILIES

TEXTS = [
    "Review: the film is good\nSentiment: positive",
    "Review: the plot was awful\nSentiment: negative",
    "a fine cast, a great film, a poor plot, bad",
]
TEMPLATE = "Review: {text}\nSentiment:"
WORDS = [" negative", " positive"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding as GPT-2 and Llama 3 have it: words take their leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)


def save_decoder(family: str, folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random causal language model with its head and tokenizer."""
    config = FAMILIES[family]()
    config.vocab_size, config.tie_word_embeddings, config.initializer_range = 512, tied, 0.3
    config.max_position_embeddings = 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def left_padded(batch: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """The same prompts behind more padding."""
    rows = len(batch["labels"])
    more = {"input_ids": pad, "attention_mask": 0, "position_ids": 0}
    return {
        name: torch.cat((torch.full((rows, 3), more[name]), value), 1) if name in more else value
        for name, value in batch.items()
    }
