"""Tokenizers round-trip, are deterministic, and are what Hugging Face reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdist.tasks.arithmetic import ALPHABET
from mxdist.tasks.tokenizer import SPECIAL_TOKENS, TaskTokenizer, character_tokenizer, train_byte_level_bpe

TEXTS = [f"Question: Ann has {n} pens.\nAnswer: #### {n * n}" for n in range(200)]
BPE = train_byte_level_bpe(TEXTS, vocab_size=400)
CHARACTERS = character_tokenizer(ALPHABET)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trips_any_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(st.text(ALPHABET))
def test_the_character_tokenizer_has_one_token_a_character(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text


def test_the_character_tokenizer_refuses_what_is_not_in_its_alphabet() -> None:
    with pytest.raises(ValueError, match="alphabet"):
        CHARACTERS.encode("3 + 4")


def test_special_tokens_come_first_and_never_out_of_text() -> None:
    for tokenizer in (BPE, CHARACTERS):
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.stop_token_ids) == (0, 1, (2,))
    assert not {0, 1, 2} & set(BPE.encode("a<eos>b<pad><bos>"))
    assert BPE.decode(BPE.encode("a<eos>b<pad>")) == "a<eos>b<pad>"


def test_decoding_stops_at_the_end_of_the_sequence_and_shows_other_special_tokens() -> None:
    (six, two) = CHARACTERS.encode("62")
    assert CHARACTERS.decode([six, two, CHARACTERS.stop_token_ids[0], six]) == "62"
    assert CHARACTERS.decode([six, CHARACTERS.bos_token_id, two]) == "6<bos>2"


def test_digits_are_single_tokens_in_bpe() -> None:
    assert len(BPE.encode("123456")) == 6
    assert BPE.vocab_size <= 400


@pytest.mark.parametrize("tokenizer", [BPE, CHARACTERS], ids=["bpe", "characters"])
def test_a_saved_tokenizer_is_read_by_transformers_and_by_the_project(tokenizer: TaskTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "tokenizer")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), TaskTokenizer.load(tmp_path / "tokenizer")
    ids = tokenizer.encode("37+25=")
    assert tuple(theirs.encode("37+25=", add_special_tokens=False)) == ours.encode("37+25=") == ids
    assert tuple(theirs.encode("37+25=")) == tokenizer.prompts(["37+25="])[0] == (1, *ids)
    assert theirs.decode(ids) == ours.decode(ids) == "37+25="
    assert [theirs.pad_token, theirs.bos_token, theirs.eos_token] == SPECIAL_TOKENS
    assert [theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id] == [0, 1, 2]
    assert len(theirs) == tokenizer.vocab_size


def test_training_gives_the_same_tokenizer_with_any_number_of_threads() -> None:
    code = (
        "import hashlib\n"
        "from mxdist.tasks.tokenizer import train_byte_level_bpe\n"
        "texts = [f'Question: {n} {n % 7} pens or {n % 11} pencils?' for n in range(3000)]\n"
        "print(hashlib.md5(train_byte_level_bpe(texts, 500)._tokenizer.to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(digests) == 1
