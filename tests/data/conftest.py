"""Fixtures for the data layer: a hub on this machine, and small real tokenizers of the two other families."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CORPUS = ["What is the capital of France? Paris is the capital of France, and the unable are able. " * 20]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as OLMo's, small: EOS, no BOS."""
    return _byte_level()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a ChatML template, whose end of turn is not the EOS."""
    tokenizer = _byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in ("<|endoftext|>", *marks)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=marks
    )


@pytest.fixture(scope="session")
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Built as Llama 2's: BPE in SentencePiece's manner, a space before any text, byte fallback, a BOS of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def serve_hub():
    """A context manager that serves files as one dataset of a hub on this machine and yields its address."""
    return _serve


@contextmanager
def _serve(repo: str, files: dict[str, str]) -> Iterator[str]:
    """Just enough of the hub's HTTP interface for `datasets` to load `files` (path to content) as `repo`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, resolved = urlsplit(self.path).path, f"/datasets/{repo}/resolve/"
            if path.startswith(resolved):
                content = files.get(path[len(resolved) :].split("/", 1)[1])
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content or "")}"'}
                if content is None:
                    headers["X-Error-Code"] = "EntryNotFound"
                self.answer(404 if content is None else 200, content or "", headers)
            elif path.startswith(f"/api/datasets/{repo}/tree/"):
                entries = [{"type": "file", "path": n, "oid": _digest(c), "size": len(c)} for n, c in files.items()]
                self.answer(200, json.dumps(entries), {})
            elif path.startswith(f"/api/datasets/{repo}"):
                siblings = [{"rfilename": name} for name in files]
                info = {"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.answer(200, json.dumps(info), {})
            else:
                self.answer(404, "", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, status: int, text: str, headers: dict[str, str]):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text.encode())

        def log_message(self, *args):
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _digest(content: str) -> str:
    return hashlib.sha1(content.encode()).hexdigest()
