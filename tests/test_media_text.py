import json
import sys
from types import ModuleType

import numpy as np
import pytest

from kavatar_jax.media.text import BYTE_VOCABULARY, ByteTokenizer, clean_like_wan, load_tokenizer

LETTERS = {name: 260 + i for i, name in enumerate(["▁", "▁a", "▁man", "▁talks", "s", "m", "a", "n"])}


@pytest.fixture
def folder(tmp_path):
    """A tiny vocabulary laid out as umT5's: pad, end, <s>, unknown, 256 bytes, pieces, sentinels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<s>", "<unk>")] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(name, -float(len(name) == 1) - 1) for name in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>", "<extra_id_0>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **names}))
    return tmp_path


def test_released_kind(folder):
    ids, mask = load_tokenizer(folder)(["a man talks", "", "mans"], 6)
    a, man, talks = (LETTERS[name] for name in ("▁a", "▁man", "▁talks"))
    assert ids.tolist() == [[a, man, talks, 1, 0, 0], [1, 0, 0, 0, 0, 0], [man, LETTERS["s"], 1, 0, 0, 0]]
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(mask, ids != 0)


def test_cut_texts_keep_their_end(folder):
    for tokenize in (load_tokenizer(folder), ByteTokenizer()):
        ids, mask = tokenize(["a man talks a man talks"], 4)
        assert ids.shape == (1, 4) and ids[0, -1] == 1 and mask.all()
        longer, _ = tokenize(["a man talks a man talks"], 400)
        np.testing.assert_array_equal(ids[0, :3], longer[0, :3])


def test_rare_characters_are_spelled_in_bytes(folder):
    """transformers' AutoTokenizer would make them 2, which is <s>."""
    ids, _ = load_tokenizer(folder)(["aé"], 8)
    first, second = "é".encode()
    assert ids[0].tolist() == [LETTERS["▁a"], 4 + first, 4 + second, 1, 0, 0, 0, 0]
    assert load_tokenizer(folder)(["<extra_id_0>"], 3)[0][0, 0] == len(LETTERS) + 260


def test_bytes(tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "bytes"}')
    ids, mask = load_tokenizer(tmp_path)(["é!", ""], 6)
    assert ids.tolist() == [[0xC3 + 3, 0xA9 + 3, ord("!") + 3, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert ids.dtype == np.int32 and mask.sum(axis=1).tolist() == [4, 1]
    everything, _ = ByteTokenizer()([chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000][::97], 9)
    assert everything.max() < BYTE_VOCABULARY and (everything[:, 0] >= 3).all()


def test_cleaning(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # as where it is not installed
    assert clean_like_wan("  a&amp;lt;b \n\t c&nbsp;d ") == "a<b c d"
    plain, cleaned = load_tokenizer(folder), load_tokenizer(folder, clean=clean_like_wan)
    messy = "a \n  man &amp;amp; talks"
    np.testing.assert_array_equal(cleaned([messy], 12)[0], plain(["a man & talks"], 12)[0])
    assert (plain([messy], 12)[0] != cleaned([messy], 12)[0]).any()

    ftfy = ModuleType("ftfy")
    ftfy.fix_text = lambda text: text.replace("Ã©", "é")
    monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    assert clean_like_wan("cafÃ© ") == "café"


def test_clear_errors(folder, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer folder at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer.json; copy the folder google/umt5-xxl"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match="'words'"):
        load_tokenizer(tmp_path / "empty")
    other = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(other | {"post_processor": None}))
    with pytest.raises(ValueError, match="not umT5's"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(folder)
