"""Captions to tokens."""

import contextlib
import hashlib
import json
import os

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

# Tokens of more would take memory, and are not quicker made.
_LENGTHS_AT_ONCE = 4096
# The tokenizers library looks at it at each call.
_PARALLEL = "TOKENIZERS_PARALLELISM"


def clean_caption(caption):
    """A caption with single spaces; punctuation and case stay."""
    return " ".join(caption.split())


# Text models whose positions begin behind the padding's number.
_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet")
# Columns of a model's input, by the names that an encoding has for them.
_COLUMNS = {
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
}


class CaptionTokenizer:
    """Tokenizes captions in batches, padded to the longest of each.

    With the tokenizers library itself: transformers' layer over it takes as
    long again.

    Arguments
    ---------
    text_model : str
        The text encoder's hub name or folder.
    text_max_length : int
        Captions of more tokens are truncated.

    Raises
    ------
    ValueError
        The text model takes no captions of that length, or its tokenizer
        cannot pad, or is not of the library.
    """

    def __init__(self, text_model, text_max_length=100):
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        if not tokenizer.is_fast or tokenizer.pad_token is None:
            raise ValueError(
                f"The tokenizer of {text_model} has no token for padding, or "
                "is not one of the tokenizers library: take another text model"
            )
        shortest = tokenizer.num_special_tokens_to_add() + 1
        longest = _longest(text_model, tokenizer)
        whole = isinstance(text_max_length, int)
        if not (whole and shortest <= text_max_length <= longest):
            raise ValueError(
                f"text_max_length={text_max_length}: {text_model} takes "
                f"{shortest} to {longest} tokens: give "
                f"--tokenizer='{{text_max_length: {longest}}}' or less"
            )
        self.text_max_length = text_max_length
        self.columns = {
            name: _COLUMNS[name]
            for name in tokenizer.model_input_names
            if name in _COLUMNS
        }
        self.padding = {
            "direction": tokenizer.padding_side,
            "pad_id": tokenizer.pad_token_id,
            "pad_type_id": tokenizer.pad_token_type_id,
            "pad_token": tokenizer.pad_token,
        }
        self.backend = tokenizer.backend_tokenizer
        self.backend.enable_truncation(
            text_max_length, direction=tokenizer.truncation_side
        )

    def settings(self):
        """What tokens depend on, as plain values: fingerprint and length."""
        parts = json.loads(self.backend.to_str())
        # As the last call asked for; the length is given below.
        del parts["truncation"], parts["padding"]
        text = json.dumps(parts, sort_keys=True)
        return {
            "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
            "text_max_length": self.text_max_length,
        }

    def __call__(self, captions):
        """Tokenize captions.

        Arguments
        ---------
        captions : list of str
            At least one.

        Returns
        -------
        dict of torch.Tensor
            input_ids, attention_mask and what else the model takes,
            (captions, longest) each.
        """
        self.backend.enable_padding(**self.padding)
        encodings = self._encode(captions)
        # torch.tensor takes several times as long for a list of lists.
        return {
            name: torch.from_numpy(
                np.array([getattr(e, column) for e in encodings], np.int64)
            )
            for name, column in self.columns.items()
        }

    def lengths(self, captions):
        """Number of tokens of each caption, without padding.

        Arguments
        ---------
        captions : list of str

        Returns
        -------
        list of int
        """
        self.backend.no_padding()
        return [
            len(encoding)
            for i in range(0, len(captions), _LENGTHS_AT_ONCE)
            for encoding in self._encode(captions[i : i + _LENGTHS_AT_ONCE])
        ]

    @staticmethod
    @contextlib.contextmanager
    def all_cores():
        """Tokenize with all cores meanwhile; no process may be forked then.

        Or with as many as RAYON_NUM_THREADS says.
        """
        before = os.environ.get(_PARALLEL)
        os.environ[_PARALLEL] = "true"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_PARALLEL]
            else:
                os.environ[_PARALLEL] = before

    def _encode(self, captions):
        return self.backend.encode_batch_fast(
            [clean_caption(caption) for caption in captions]
        )


def _longest(text_model, tokenizer):
    """Tokens of the longest text that a text model takes."""
    config = AutoConfig.from_pretrained(text_model)
    positions = getattr(config, "max_position_embeddings", None) or -1
    if positions < 0:  # it has no limit of its own
        return tokenizer.model_max_length
    if config.model_type in _POSITIONS_AFTER_PAD:
        return positions - config.pad_token_id - 1
    return positions
