"""The texts of `--retain self`: the original model writes them once, before it is trained; later runs read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data.reading import is_text
from lowmem_npo.data.self_written import TOKENS, beginning_ids, beginnings, self_rows
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenizing import Encoder
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.generation import Prompt, sampled_answers, text_of
from lowmem_npo.files import write_atomically
from lowmem_npo.model import resolve_name
from lowmem_npo.run_directory import RunDirectory

SEED = 0  # the texts do not depend on --seed, so that runs with several seeds can be compared
ROUNDS = 16  # in which what came out empty is tried anew
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")


def own_texts(config: RunConfig, model_config: PretrainedConfig) -> Path | None:
    """The file of the texts: that of the run, where it is resumed, else one in the user's cache (beside the models of
    the hub) that is keyed by all that decides what is written. None unless --retain is self."""
    rows = self_rows(config.data.retain)
    if rows is None:
        return None
    of_run = RunDirectory(config).self_written
    if config.output.resume and of_run.exists():
        return of_run
    name, data = resolve_name(config.model.model, config.model.revision)[0], config.data
    key = {
        "model": _stamp(name),
        "commit": getattr(model_config, "_commit_hash", None),
        "weights": [config.model.revision, config.model.dtype, config.model.qlora],
        "adapter": _stamp(config.adapter.adapter) if config.adapter.adapter else None,
        "form": [data.template, data.prompt_template, data.system],
        "texts": [rows, TOKENS, SEED],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(huggingface_hub.constants.HF_HOME) / "lowmem-npo" / "self_written"
    return cache / f"{Path(name).name}-{digest}" / of_run.name


def write_own_texts(
    path: Path, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, say: Say
) -> None:
    """Lets `model`, whose adapters are off, write the texts into `path`.

    Raises UserError for a model that writes nothing, or a place that cannot be written.
    """
    rows = self_rows(config.data.retain)
    assert rows is not None
    template = Template.of(config.data)
    say(f"The original model writes {rows} texts of its own, which are to hold it where it was.")
    begun, encoder = beginnings(rows, tokenizer, template), Encoder(tokenizer, template)
    prompts = [Prompt(beginning_ids(example, encoder), TOKENS) for example in begun]
    written: dict[int, dict[str, Any]] = {}
    for attempt in range(ROUNDS):
        missing = [index for index in range(rows) if index not in written]
        answers = sampled_answers(
            model,
            tokenizer,
            [prompts[index] for index in missing],
            samples=1,
            seed=SEED + attempt,
            batch_size=config.output.eval_batch_size,
            description="own texts",
        )
        for index, (ids,) in zip(missing, answers, strict=True):
            text, example = text_of(tokenizer, ids), begun[index]
            if not (text.strip() and is_text(text)):
                continue
            goes_on = {"continues": len(ids) >= TOKENS}
            if example.schema == "text":
                written[index] = {"text": f"{example.prompt}{text}", **goes_on}
            else:
                written[index] = {"question": example.prompt, "answer": text.strip(), **goes_on}
        if len(written) == rows:
            break
    if not written:
        raise UserError("--retain self: the original model writes nothing at all; name rows to --retain, or builtin.")
    if len(written) < rows:
        say(f"Of {rows} texts it wrote {len(written)}; the others came out empty.")
    lines = [json.dumps(written[index], ensure_ascii=False) + "\n" for index in sorted(written)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines))
    except OSError as error:
        raise UserError(
            f"--retain self: '{path}' cannot be written ({error.strerror}); set HF_HOME to another place."
        ) from error


def _stamp(name: str) -> list[Any]:
    """A hub name, or a directory with what tells that its weights have changed."""
    folder = Path(name).expanduser()
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)) if folder.is_dir() else []
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return [str(folder.resolve()) if folder.is_dir() else name, stats]
