"""Stage ``embed``: a text as the encoder takes it, in few shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.classify.weights import model_file

LENGTHS = (16, 32, 64, 128, 256)
"""Texts are padded to one of these numbers of tokens, so that batches have few shapes; those of one length run
together. The model was trained on at most 256 tokens, longer texts are cut."""


def before(text: Any) -> npt.NDArray[np.int64]:
    """The text's token ids, int64[length] with one of :data:`LENGTHS`; 0 is padding."""
    if not isinstance(text, str):
        raise TypeError(f"an item is a {type(text).__name__}, not a text")
    found = _tokenizer().encode(text).ids
    ids = np.zeros(next(length for length in LENGTHS if length >= len(found)), np.int64)
    ids[: len(found)] = found
    return ids


def sample() -> str:
    """For profiling: what a short letter says."""
    return "Dear Ms Ferrar, the invoice for our work in March is due in 30 days. Yours sincerely, Edda Holm"


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_file("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    return tokenizer
