"""Captions to tokens."""

import hashlib
import json

import torch
from transformers import AutoTokenizer

# Tokens of more would take memory, and are not quicker made.
_LENGTHS_AT_ONCE = 4096


def clean_caption(caption):
    """A caption with single spaces; punctuation and case stay."""
    return " ".join(caption.split())


class CaptionTokenizer:
    """Tokenizes captions in batches, padded to the longest of each.

    Arguments
    ---------
    text_model : str
        The text encoder's hub name or folder.
    text_max_length : int
        Captions of more tokens are truncated.
    """

    def __init__(self, text_model, text_max_length=100):
        self.tokenizer = AutoTokenizer.from_pretrained(text_model)
        self.text_max_length = text_max_length

    def settings(self):
        """What tokens depend on, as plain values: fingerprint and length."""
        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
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
        tokens = self._tokenize(captions, padding=True, return_tensors="pt")
        return {k: v for k, v in tokens.items() if torch.is_tensor(v)}

    def lengths(self, captions):
        """Number of tokens of each caption, without padding.

        Arguments
        ---------
        captions : list of str

        Returns
        -------
        list of int
        """
        parts = (
            captions[i : i + _LENGTHS_AT_ONCE]
            for i in range(0, len(captions), _LENGTHS_AT_ONCE)
        )
        return [
            len(ids)
            for part in parts
            for ids in self._tokenize(part)["input_ids"]
        ]

    def _tokenize(self, captions, **options):
        return self.tokenizer(
            [clean_caption(caption) for caption in captions],
            truncation=True,
            max_length=self.text_max_length,
            **options,
        )
