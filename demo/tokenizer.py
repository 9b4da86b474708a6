"""A word-level tokenizer of pronounceable words that transformers loads without a network."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>")
# Words a prompt may use; whatever is not in the vocabulary becomes <unk>.
ENGLISH = (
    "a and at block bright by cat cold day deep dog down each eight fast fire five for four from garden go good "
    "green hand has high hot house in is it light little long man many model moon more morning mountain new night "
    "nine no of old on once one open or over people quick quiet rain red river road run sea seven she ship six "
    "sky slow small snow so star stone story sun ten that the then there they this three time to town tree two "
    "under upon wall warm was water way we well went were white wind wood word world year yes you young"
).split()


def words(vocab: int) -> list[str]:
    """Return the vocabulary: special tokens, English words, then made-up words of consonant-vowel syllables."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    syllables = [consonant + vowel for consonant in consonants for vowel in vowels]
    made_up = (first + second + third for third in ["", *syllables] for first in syllables for second in syllables)
    result = [*SPECIAL, *ENGLISH]
    taken = set(result)
    result += [word for word in made_up if word not in taken][: max(0, vocab - len(result))]
    assert len(result) == vocab, f"vocab {vocab} is outside {len(taken)}..{len(result)}"
    return result


def write_tokenizer(folder: Path, vocab: int, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json for a vocabulary of `vocab` tokens."""
    mark = "\u2581"  # stands for the space before a word
    ids = {word if word in SPECIAL else mark + word: index for index, word in enumerate(words(vocab))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(mark)
    tokenizer.decoder = decoders.Metaspace(mark)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=1) + "\n")
