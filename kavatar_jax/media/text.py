"""Text -> token ids for umT5: the released vocabulary, or plain bytes for models that were trained on them.

Both give ids (B, length) int32 and the mask (B, length) bool of real tokens: pad is 0, every text ends in 1, also where
it was cut, and padding is on the right.
"""

import html
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

PAD, END = 0, 1
BYTE_OFFSET = 3  # as in ByT5 (Xue et al. 2022): pad, end and one that is never used come first
BYTE_VOCABULARY = BYTE_OFFSET + 256

Tokenizer = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def load_tokenizer(folder: str | Path, *, clean: Callable[[str], str] | None = None) -> Tokenizer:
    """A function of (texts, length) that returns (ids, mask).

    folder: one with the tokenizer.json of google/umt5-xxl, or one whose config.json is {"kind": "bytes"}
    clean: applied to every text first; the Wan models were run with `clean_like_wan`, StableAvatar with nothing
    ValueError if there is no such folder or no tokenizer of umT5 in it.
    """
    folder = Path(folder)
    tokenizer = ByteTokenizer() if _kind(folder) == "bytes" else _Released(folder)
    if clean is None:
        return tokenizer
    return lambda texts, length: tokenizer([clean(text) for text in texts], length)


class ByteTokenizer:
    """UTF-8 bytes, each of them 3 more than itself."""

    def __call__(self, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(texts), length), PAD, np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = np.frombuffer(text.encode()[: length - 1], np.uint8).astype(np.int32) + BYTE_OFFSET
            row[: len(tokens)] = tokens
            row[len(tokens)] = END
        return ids, ids != PAD


def clean_like_wan(text: str) -> str:
    """Wan2.1's cleaning: mend wrong decodings (where ftfy is installed), undo HTML escapes twice, single spaces."""
    try:
        import ftfy  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


class _Released:
    """tokenizer.json as it is written.

    Not AutoTokenizer: since transformers 5 that rebuilds the vocabulary as T5's, whose unknown token is 2 and which
    has no bytes to fall back on. In umT5's, 2 is another token and rare characters are spelled in bytes.
    """

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json; copy the folder google/umt5-xxl of the released weights")
        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the parser's own errors are bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(PAD)
        self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        ids = self._tokenizer("a")["input_ids"]
        if ids[-1] != END:
            raise ValueError(f"the tokenizer in {folder} ends a text in {ids[-1]}, not in {END}: it is not umT5's")

    def __call__(self, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
        return tokens["input_ids"].astype(np.int32), tokens["attention_mask"].astype(bool)


def _kind(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"there is no tokenizer folder at {folder}")
    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("kind", "umt5") if config.is_file() else "umt5"
    if kind not in ("umt5", "bytes"):
        raise ValueError(f"{config} names the kind {kind!r}; it is 'umt5' (with a tokenizer.json) or 'bytes'")
    return kind
