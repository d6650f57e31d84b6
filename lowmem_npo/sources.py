"""What the names of models and data may mean: kinds of files, directories, names on the hub.

Known without PyTorch or Transformers, so that a mistyped path is answered at once. Of a name on the hub,
`huggingface_hub` says whether it is here or to be had.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded, load_json
from lowmem_npo.libraries import hub_problem

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
SELF = re.compile(r"self(:(?P<rows>\d{1,9}))?", re.ASCII)


def kind_of(path: Path) -> str:
    """The suffix that says how the file is read; two where the file is compressed."""
    suffixes = path.name.lower().split(".")[1:]
    return "".join(f".{suffix}" for suffix in (suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:]))


def data_names(source: str) -> list[str]:
    """`source`, or what it names with commas between them."""
    if "," in source and not os.path.exists(expanded(source)):  # False for what is too long for a name, too
        return [name for part in source.split(",") if (name := part.strip())]
    return [source]


def check_data_name(name: str) -> None:
    """Raises UserError for what is neither a file or folder here, nor a name on the hub, nor `BUILTIN` or `SELF`."""
    path = expanded(name)
    if path.is_file() or path.is_dir() or name in BUILTIN or SELF.fullmatch(name):
        return
    if path.exists():  # which cannot be read twice, or never ends
        raise UserError(f"{name} is a pipe, a socket or a device; write what it gives into a file, and name that.")
    if kind_of(path) in FILE_KINDS:
        raise UserError(f"There is no file {name}; check the path.")
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name} is neither a file nor a hub name; give a path ({', '.join(FILE_KINDS)}) "
            "or owner/name:configuration."
        )


def named_twice(names: Sequence[str]) -> str | None:
    """What is named twice, however it is spelled, for a message; None where each name means another thing."""
    places: dict[Path, str] = {}
    for name in names:
        place = _place(name)
        if place in places:
            return f"{name} is named twice" if places[place] == name else f"{name} is the same as {places[place]}"
        places[place] = name
    return None


def check_named_once(names: Sequence[str]) -> None:
    """Raises UserError where two names of one set mean the same, or one is in a folder that is named beside it."""
    places = {_place(name): name for name in names}
    problem = named_twice(names) or next(
        (f"{name} is in {places[up]}" for place, name in places.items() for up in _above(place) if up in places), None
    )
    if problem is not None:
        raise UserError(f"{problem}, so that its rows would count twice; name it once.")


def _place(name: str) -> Path:
    path = expanded(name)
    return path.resolve() if os.path.exists(path) else Path(name)


def _above(place: Path) -> Iterator[Path]:
    """The folders with which a file here is read: those that it is in, but for what is hidden; a name on the hub is in
    none."""
    while place.is_absolute() and place != place.parent and not place.name.startswith("."):
        place = place.parent
        yield place


def check_model_name(name: str) -> bool:
    """Whether `name` is a directory here. What looks like a path must be a model's: a typo should not be looked up on
    the hub.

    Raises:
        UserError: no such directory, or one without a model.
    """
    path = expanded(name)
    if path.is_dir():
        config_file = path / "config.json"
        if not config_file.is_file():
            raise UserError(f"The directory '{name}' holds no model: there is no config.json in it{_instead(path)}.")
        try:
            load_json(config_file).get("model_type")
        except AttributeError as error:
            raise UserError(f"'{config_file}' holds no model's configuration.") from error
        return True
    if path.is_file():
        form = "a GGUF file, which is not trained on" if path.suffix.lower() == ".gguf" else "a file"
        raise UserError(f"'{name}' is {form}: give the directory of a model in transformers' format.")
    if is_path(name):
        raise UserError(
            f"There is no directory '{name}': give a model directory, or a hub name such as allenai/OLMo-1B-hf."
        )
    return False


def is_path(name: str) -> bool:
    """Whether a model's name cannot be one on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _instead(folder: Path) -> str:
    """What a directory without a model holds, as far as it may have been taken for one."""
    if (folder / "adapter_config.json").is_file():
        return ", but an adapter: give its base model here, and the adapter to --adapter"
    if any(folder.glob("*.gguf")):
        return ", but a GGUF file: give the model in transformers' format that it was made from"
    return ""


def check_file(flag: str, name: str | None, kept: bool = False) -> None:
    """Raises UserError unless the option `flag` is not given, or names a file. kept: whether a resumed evaluation may
    have it from its beginning."""
    if name is not None and not expanded(name).is_file():
        what = f"'{name}' is no file" if os.path.lexists(expanded(name)) else f"there is no file '{name}'"
        raise UserError(f"{flag}: {what}{f'; {flag} none goes on without it' if kept else ''}.")


def check_adapter_name(name: str) -> None:
    """Raises UserError for what is no directory."""
    if not expanded(name).is_dir():
        raise UserError(f"There is no directory '{name}': --adapter is the output directory of a training run.")


def check_model_is_here(name: str, revision: str | None = None) -> None:
    """Raises UserError for a model of the hub of which this machine has nothing, where the hub cannot be reached. Often
    a directory was meant."""
    repo = name.strip().rstrip("/")
    copies = (_hub_cache("models", each) for each in (repo, f"{repo}-hf"))  # by which an original OLMo is replaced
    if not check_model_name(name) and not any(copy.exists() for copy in copies) and (problem := hub_problem()):
        where = f"model '{name}'" + (f" at revision '{revision}'" if revision else "")
        raise UserError(model_not_here(where, problem))


def check_data_is_here(name: str) -> None:
    """The same of data."""
    match = None if expanded(name).exists() or name in BUILTIN else HUB_NAME.fullmatch(name)
    if match is None:
        return
    from huggingface_hub import constants

    datasets = expanded(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    prepared = any(datasets.glob(f"{match['repo'].partition('/')[0]}___*"))  # the rest is spelled otherwise there
    if not prepared and not _hub_cache("datasets", match["repo"]).exists() and hub_problem():
        raise UserError(data_not_here(name, match["repo"]))


def model_not_here(what: str, problem: str) -> str:
    """What is said of a model that is nowhere. problem: why the hub cannot be reached."""
    return (
        f"The {what} is not on this machine and the hub cannot be reached: check the network, "
        f"or give a local directory. ({problem})"
    )


def data_not_here(name: str, repo: str) -> str:
    return (
        f"{name} is no local file, the hub cannot be reached, and there is no local copy of {repo}; "
        "connect to the network once, or give the path of a file."
    )


def _hub_cache(kind: str, repo: str) -> Path:
    """Where huggingface_hub keeps its copies of a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{kind}--{repo.replace('/', '--')}")
