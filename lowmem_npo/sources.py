"""What the names of models and data may mean: kinds of files, directories, names on the hub.

Known without any library, so that a mistyped path is answered at once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lowmem_npo.errors import UserError

TEXT_KINDS = (".jsonl", ".json", ".csv", ".tsv")
TABLE_KINDS = (*TEXT_KINDS, ".parquet", ".arrow", *(f"{kind}.gz" for kind in TEXT_KINDS))
PLAIN_KINDS = (".txt", ".text", ".md", ".markdown")
HTML_KINDS = (".html", ".htm", ".xhtml")
DOCUMENT_KINDS = (*PLAIN_KINDS, *HTML_KINDS, ".pdf", *(f"{kind}.gz" for kind in (*PLAIN_KINDS, *HTML_KINDS)))
FILE_KINDS = (*TABLE_KINDS, *DOCUMENT_KINDS)
# owner/name, then optionally :configuration, /split and @revision
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(/(?P<split>[\w.-]+))?)?(@(?P<revision>[\w./-]+))?"
)


# What --retain takes beside files: the bundled general set, of which a part is held out, and the model's own texts.
GENERAL_SET = "builtin"
BUILTIN = {GENERAL_SET: "general", f"{GENERAL_SET}:holdout": "general_holdout"}
SELF = re.compile(r"self(:(?P<rows>\d+))?")


def kind_of(path: Path) -> str:
    """The suffix that says how the file is read; two where the file is compressed."""
    suffixes = path.name.lower().split(".")[1:]
    return "".join(f".{suffix}" for suffix in (suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:]))


def data_names(source: str) -> list[str]:
    """`source`, or what it names with commas between them."""
    if "," in source and not Path(source).expanduser().exists():
        return [name for part in source.split(",") if (name := part.strip())]
    return [source]


def check_data_name(name: str) -> None:
    """Raises UserError for what is neither a file or folder here, nor a name on the hub, nor `BUILTIN` or `SELF`."""
    path = Path(name).expanduser()
    if path.exists() or name in BUILTIN or SELF.fullmatch(name):
        return
    if kind_of(path) in FILE_KINDS:
        raise UserError(f"There is no file {name}; check the path.")
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name} is neither a file nor a hub name; give a path ({', '.join(FILE_KINDS)}) "
            "or owner/name:configuration."
        )


def check_model_name(name: str) -> bool:
    """Whether `name` is a directory here. What looks like a path must be a model's: a typo should not be looked up on
    the hub.

    Raises:
        UserError: no such directory, or one without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise UserError(f"The directory '{name}' holds no model: there is no config.json in it.")
        try:
            json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise UserError(f"'{config_file}' is not valid JSON: {error}.") from error
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"There is no directory '{name}': give a model directory, or a hub name such as allenai/OLMo-1B-hf."
        )
    return False


def check_adapter_name(name: str) -> None:
    """Raises UserError for what is no directory."""
    if not Path(name).expanduser().is_dir():
        raise UserError(f"There is no directory '{name}': --adapter is the output directory of a training run.")
