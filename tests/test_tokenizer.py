import pickle

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from natfp_jax.datasets.stories import story
from natfp_jax.errors import UserError
from natfp_jax.tokenizer import EOS, Tokenizer

TEXTS = [story(0, index) for index in range(200)]


def trained(size=512):
    return Tokenizer.train(iter(TEXTS), size)


TOKENIZER = trained()


@given(st.text())
def test_a_text_survives_its_ids(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.binary(max_size=12))
def test_broken_utf8_is_replaced_as_python_replaces_it(data):
    byte_ids = {byte: TOKENIZER.encode(bytes([byte]).decode("latin-1")) for byte in range(128)}
    # Bytes above 127 have no text of their own: take them from the two-byte texts that hold them.
    for point in range(0x80, 0x800):
        character = chr(point)
        ids = TOKENIZER.encode(character)
        if len(ids) == 2:
            for byte, one in zip(character.encode(), ids, strict=True):
                byte_ids.setdefault(byte, [one])
    known = bytes(byte for byte in data if byte in byte_ids)
    ids = [i for byte in known for i in byte_ids[byte]]
    assert TOKENIZER.decode(ids) == known.decode(errors="replace")


def test_special_text_in_a_document_stays_text(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(TOKENIZER))):
        ids = tokenizer.encode(f"a{EOS}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a{EOS}b"


def test_special_and_padding_ids_add_no_text():
    tokenizer = trained(400)
    ids = tokenizer.encode("Once upon a time")
    noise = [tokenizer.eos_id, tokenizer.size, tokenizer.padded_size - 1]
    assert tokenizer.decode([*noise, *ids, *noise]) == "Once upon a time"


def test_training_is_deterministic_and_the_hash_survives_the_disk(tmp_path):
    assert trained().file == TOKENIZER.file
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == TOKENIZER
    assert loaded.sha256 == TOKENIZER.sha256
    assert (loaded.eos_id, loaded.size, loaded.padded_size) == (0, 512, 512)


@pytest.mark.parametrize(("size", "padded"), [(257, 384), (384, 384), (385, 512)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(size, padded):
    tokenizer = trained(size)
    assert (tokenizer.size, tokenizer.padded_size) == (size, padded)


def test_a_batch_is_its_texts_one_by_one():
    assert TOKENIZER.encode_batch(TEXTS[:20]) == [TOKENIZER.encode(text) for text in TEXTS[:20]]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocabulary 256 is too small: a byte-level BPE needs at least 257"):
        trained(256)


def one_line(message):
    assert "\n" not in message
    return message


def test_each_bad_file_gives_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read \(No such file") as caught:
        Tokenizer.load(path)
    one_line(str(caught.value))
    for content in (b"", b"{}", b"{\n\n", b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer \(") as caught:
            Tokenizer.load(path)
        one_line(str(caught.value))
    plain = tokenizers.Tokenizer(models.BPE())
    plain.save(str(path))
    with pytest.raises(UserError, match="has no special token '<|eos|>'".replace("|", r"\|")):
        Tokenizer.load(path)
    plain.add_tokens([EOS])  # an ordinary added token would be found in the text of documents
    plain.save(str(path))
    with pytest.raises(UserError, match="has no special token"):
        Tokenizer.load(path)
    plain.add_special_tokens([EOS])
    plain.save(str(path))
    assert Tokenizer.load(path).eos_id == 0
