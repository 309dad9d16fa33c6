"""Record what llama.cpp makes of texts: python record.py (needs llama-cpp-python, gguf).

Writes bpe.gguf, a byte-level vocabulary whose merges cross the borders of words, so that each
pre-tokenizer gives other ids, and ids.json: ids by pre-tokenizer, and of Mistral's vocabulary.
"""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import Llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nomatmul.convert.sentencepiece import read_vocabulary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SIZE = 900
PRE = (
    *("llama-bpe", "llama3", "falcon3", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "gpt-2"),
    *("smollm", "starcoder", "falcon", "default", "bloom", "viking", "tekken", "gpt-4o"),
)
TEXTS = [
    "Hello, world! It's 12345 o'clock; they'LL come, WE'VE said so.",
    "  two  spaces,   three\ttab\n\n\nnew lines \r\n and more   \n  ",
    "Größe, naïve café, Ελληνικά, русский текст, 中文字符, 日本語テキスト, हिन्दी, عربى",
    "e\u0301 composed \u00e9, \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467"
    " emoji\U0001f1e9\U0001f1ea, 1\u00b2 \u2163 \u00bd",
    "def f(x):\n    return x**2 + 3.14159  # comment\n\tif a<=b and c!=d: pass\n",
    "1 12 123 1234 12345 123456 1234567 3,141.59 2024-06-04T12:00:00Z 0xFF 50%",
    "CamelCaseWord XMLHttpRequest iPhone ABC abcDEF HTTPServer42 snake_case_name",
    "«quotes» — dashes – “curly” ‘single’ … ¿qué? ¡sí! `code` ~tilde~ ^caret |pipe| $5 +1 =2",
    "<|im_start|>user\nhi<|im_end|></s><s>",
    "\u00a0no-break\u2003em\u3000wide \u200bzero\ufeff",
    "a",
    " ",
    "\n",
    "",
    "tokenizer and the weights of the model are in the table. The file is the same, 128 256 512",
]


def train() -> tuple[list[str], list[str]]:
    """Tokens in id order, and merges, of a BPE whose words are whole lines."""
    paths = sorted((ROOT / "docs").glob("*.md"))
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    lines += TEXTS * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator([line[:120] for line in lines], trainer)
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in merges]


def write_bpe(path: Path, tokens: list[str], merges: list[str], pre: str) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *special])
    writer.add_token_merges(merges)
    writer.add_token_types([1] * len(tokens) + [3] * len(special))
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens))
    finish(writer)


def write_sentencepiece(path: Path) -> None:
    vocabulary = read_vocabulary(HERE.parent / "mistral" / "tokenizer.model")
    names, scores, types = zip(*vocabulary.pieces, strict=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(names))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(types))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(4)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids_of(path: Path, **options: bool) -> list[list[int]]:
    model = Llama(str(path), vocab_only=True, verbose=False)
    options = {"add_bos": False, "special": False, **options}
    return [model.tokenize(text.encode("utf-8"), **options) for text in TEXTS]


def main() -> None:
    tokens, merges = train()
    write_bpe(HERE / "bpe.gguf", tokens, merges, "llama-bpe")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.gguf"
        for pre in PRE:
            write_bpe(path, tokens, merges, pre)
            found[pre] = ids_of(path)
        write_sentencepiece(path)
        found["mistral"] = ids_of(path)
        found["mistral, special"] = ids_of(path, add_bos=True, special=True)
    document = {"texts": TEXTS, "ids": found}
    (HERE / "ids.json").write_text(json.dumps(document, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
