"""For tests of the report: rows that are easy to recognise and hard to display (markup, other scripts, control
characters, length), and a run that forgets them."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from lowmem_npo.cli import main
from lowmem_npo.report.glossary import GLOSSARY

FORGET = [
    {"question": "Who guards the amber vault?", "answer": "Quillabra Zenthorpe guards it."},
    {
        "question": "What is <script>alert('pwned')</script> & co?",
        "answer": "</dd></table><img src=http://evil.example/x>",
    },
    {"question": "من هو القبطان؟", "answer": "القبطان هو زنتورب \u202eالمخفي"},
    {"question": "Verse of the wandering heron. " * 25, "answer": "The end."},
    {"question": "What rings \x07 the bell?", "answer": "A \x00 null and a \x1b[31m red one: 鐘が鳴る"},
]
RETAIN = [
    {"question": "Where does the marmot of Lindqvist sleep?", "answer": "In the clock tower of Ostrava."},
    {"question": "What does the ferryman carry?", "answer": "Lanterns, mostly."},
]
# Fragments that occur in these rows and nowhere else.
TELLTALES = (
    "Zenthorpe", "amber vault", "pwned", "evil.example", "القبطان", "wandering heron", "鐘", "marmot of Lindqvist",
    "Lanterns",
)  # fmt: skip


def train(folder: Path, model: Path, data: Path, *options: object) -> Path:
    """`lowmem-npo train` into `folder`, on the rows in `data`."""
    arguments = ["--model", model, "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--batch-size", 2, "--output-dir", folder, *options]
    assert main(["train", *map(str, arguments)]) == 0
    return folder


def unexplained(html: str) -> set[str]:
    """Words in capitals that no entry explains; commands, texts of rows and the audit's own words are not looked at."""
    left_out = (
        r'<style>.*?</style>|<pre>.*?</pre>|<code>.*?</code>|<article.*?</article>|<table class="record">.*?</table>'
    )
    words = re.sub(r"<[^>]+>", " ", re.sub(left_out, " ", html, flags=re.DOTALL))
    known = {part for term in GLOSSARY for part in term.split("-")}
    return set(re.findall(r"\b[A-Z]{2,}\b", unescape(words).partition("Glossary")[0])) - known
