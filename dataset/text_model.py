"""A small BERT made on the spot: configuration and vocabulary, no weights.

Where no pretrained text encoder can be had, or none is wanted, this makes one
to train from scratch whose vocabulary is the words of some captions:

    python -m dataset.text_model captions.csv OUTPUT_FOLDER

The folder is given as --text_model, with text_pretrained: False.
"""

import argparse
import os
import string
import sys

from transformers import BertConfig, BertTokenizerFast

from files import read_table

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_text_model(captions, folder, hidden_size=64, max_length=128):
    """Write configuration and tokenizer of a small, lower-case BERT.

    It has two layers, of two attention heads each.

    Arguments
    ---------
    captions : iterable of str
        Texts whose words become tokens. Any other word of the same
        characters, or of ASCII ones, is spelled.
    folder : str
        Folder to write config.json, vocab.txt and the tokenizer's files to;
        made if absent.
    hidden_size : int
        Width of the model; the feed-forward layers are twice as wide.
    max_length : int
        Tokens of the longest text.
    """
    os.makedirs(folder, exist_ok=True)
    vocabulary = _vocabulary(captions)
    # transformers 5 saves the vocabulary in tokenizer.json alone; vocab.txt
    # is what other BERT tokenizers read.
    path = os.path.join(folder, "vocab.txt")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{token}\n" for token in vocabulary)
    tokenizer = BertTokenizerFast(
        vocab={token: i for i, token in enumerate(vocabulary)},
        do_lower_case=True,
        model_max_length=max_length,
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_length,
        # BERT's 0.02 suits its width of 768. Here a layer would change its
        # input by a few percent, and [CLS] would hardly tell captions apart.
        initializer_range=hidden_size**-0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(folder)


def _vocabulary(captions):
    """Special tokens, single characters and whole words, in this order."""
    splitter = BertTokenizerFast(do_lower_case=True).backend_tokenizer
    words = set()
    for caption in captions:
        normal = splitter.normalizer.normalize_str(caption)
        split = splitter.pre_tokenizer.pre_tokenize_str(normal)
        words.update(word for word, _ in split)
    letters = set(string.ascii_lowercase + string.digits + string.punctuation)
    letters = sorted(letters.union(*words))
    spelling = letters + [f"##{letter}" for letter in letters]
    return SPECIAL_TOKENS + spelling + sorted(words.difference(letters))


def main(argv):
    """Make a text model for the captions of a CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.text_model",
        description="Make a small BERT, without weights, for some captions.",
    )
    parser.add_argument("captions_csv", help="CSV with a column `caption`")
    parser.add_argument("output_folder")
    args = parser.parse_args(argv)
    table = read_table(args.captions_csv, ["caption"])
    make_text_model(table["caption"], args.output_folder)
    print(f"Text model for {len(table)} captions in {args.output_folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
