"""A tokenizer without files or vocabulary to fetch: one token a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.processor import ProcessorStepRegistry, TokenizerProcessorStep
from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def byte_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """Bytes are the ids 0..255; pad, bos, eos and then ``special_tokens`` follow in this order."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS, *special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


@ProcessorStepRegistry.register(name="tiny_byte_tokenizer")
@dataclass
class ByteTokenizerProcessorStep(TokenizerProcessorStep):
    """LeRobot's tokenizing step over :func:`byte_tokenizer`: a saved processor needs no folder."""

    def __post_init__(self) -> None:
        self.input_tokenizer: Any = byte_tokenizer()
