"""The texts of `--retain self` and the answers of `--alternatives self`: the original model writes them once, before it
is trained; later runs read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowmem_npo.claim import make_directory
from lowmem_npo.config import RunConfig
from lowmem_npo.console import Say
from lowmem_npo.data.example import Example
from lowmem_npo.data.fit import known_fit
from lowmem_npo.data.rows import is_text
from lowmem_npo.data.self_answered import LONGEST, answers_number, asking, most_tokens, other_answer
from lowmem_npo.data.self_written import TOKENS, beginning_ids, beginnings, self_rows
from lowmem_npo.data.templates import Template
from lowmem_npo.data.tokenized_rows import TokenizedRows
from lowmem_npo.data.tokenizing import Encoder
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.scoring.batching import at_once
from lowmem_npo.evaluation.scoring.generation import Prompt, sampled_answers, text_of
from lowmem_npo.files import json_sha256, write_atomically
from lowmem_npo.model import resolve_name
from lowmem_npo.model.names import ASKING, WEIGHTS, digest_of
from lowmem_npo.run_directory import RunDirectory
from lowmem_npo.sizes import first_of

SEED = 0  # the texts do not depend on --seed, so that runs with several seeds can be compared
ROUNDS = 16  # in which what came out empty is tried anew


def own_texts(config: RunConfig) -> Path | None:
    """The file of the texts: that of the run, where it is resumed, else one in the user's cache (beside the models of
    the hub) that is keyed by all that decides what is written. None unless --retain is self."""
    rows = self_rows(config.data.retain)
    if rows is None:
        return None
    of_run = RunDirectory(config).self_written
    if config.output.resume and of_run.exists():
        return of_run
    data = config.data
    key = {"form": [data.template, data.system], "texts": [rows, TOKENS, SEED]}
    return _cached(config, "self_written", key | _date(config)) / of_run.name


def own_answers(config: RunConfig, examples: Sequence[Example]) -> Path:
    """The file of the answers of `--alternatives self` to `examples`, likewise."""
    of_run = RunDirectory(config).alternatives
    if config.output.resume and of_run.exists():
        return of_run
    rows = [[one.prompt, one.answer, *(one.messages or ())] for one in examples]
    key = {"rows": rows, "answers": [answers_number(config.data.alternatives), LONGEST, SEED, config.data.max_length]}
    return _cached(config, "alternatives", {**key, "system": config.data.system} | _date(config)) / of_run.name


def _date(config: RunConfig) -> dict[str, Any]:
    """That which was asked for: the day's would be another every day, for templates that write none, too."""
    return {"date": config.data.chat_date} if "chat_date" in config.explicit else {}


def _cached(config: RunConfig, kind: str, key: dict[str, Any]) -> Path:
    """The folder for what the model of a run writes: another for another model, and for another `key`."""
    name = resolve_name(config.model.model, config.model.revision)
    key = {
        "model": [digest_of(name, config.model.revision, files) for files in (WEIGHTS, ASKING)],
        "weights": [config.model.revision, config.model.dtype, config.model.qlora],
        "adapter": digest_of(config.adapter.adapter) if config.adapter.adapter else None,
        **key,
    }
    folder = f"{Path(name).name}-{json_sha256(key)[:16]}"
    return Path(huggingface_hub.constants.HF_HOME) / "lowmem-npo" / kind / folder


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

    def take(index: int, ids: Sequence[int]) -> bool:
        text, example = text_of(tokenizer, ids), begun[index]
        if not (text.strip() and is_text(text)):
            return False
        goes_on = {"continues": len(ids) >= TOKENS}
        if example.schema == "text":
            written[index] = {"text": f"{example.prompt}{text}", **goes_on}
        else:
            written[index] = {"question": example.prompt, "answer": text.strip(), **goes_on}
        return True

    _let_write(model, tokenizer, prompts, take, ROUNDS, _at_once(config, prompts), "own texts")
    if not written:
        raise UserError("--retain self: the original model writes nothing at all; name rows to --retain, or builtin.")
    if len(written) < rows:
        say(f"Of {rows} texts it wrote {len(written)}; the others came out empty.")
    _write(path, [written[index] for index in sorted(written)], "--retain self")


def check_askable(
    config: RunConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, architecture: PretrainedConfig
) -> None:
    """Raises UserError for a row that is too long for the model to be shown it and asked for another answer."""
    fit, template = known_fit(architecture), Template.of(config.data)
    if fit is None or fit.positions is None:
        return
    for example in examples:
        if (length := len(asking(example, tokenizer, template))) > fit.positions:
            raise UserError(
                f"--alternatives {config.data.alternatives}: {example.where} and the request for another answer have "
                f"{length} tokens, but the model has learnt only {fit.positions} positions: write the answers "
                "yourself, into a column that --alternative-column names, or remove the row."
            )


def write_own_answers(
    path: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    rows: TokenizedRows,
    say: Say,
) -> None:
    """Lets `model`, whose adapters are off, write other answers to the forget `rows` into `path`.

    Raises UserError, naming rows to which it writes none, or a place that cannot be written.
    """
    number, template = answers_number(config.data.alternatives), Template.of(config.data)
    assert number is not None
    say(f"The original model writes {number} other answers to each of {len(rows)} forget rows.")
    asked = [
        Prompt(asking(one, tokenizer, template), most_tokens(row)) for one, row in zip(rows.examples, rows, strict=True)
    ]
    answers: list[list[str]] = [[] for _ in rows]

    def take(index: int, ids: Sequence[int]) -> bool:
        text = text_of(tokenizer, ids)
        cut = len(ids) >= asked[index].max_new_tokens
        if is_text(text) and (answer := other_answer(text, rows.examples[index], cut)) is not None:
            answers[index].append(answer)
        return len(answers[index]) == number

    _let_write(model, tokenizer, asked, take, number + ROUNDS, _at_once(config, asked), "other answers")
    if without := [one.where for one, own in zip(rows.examples, answers, strict=True) if not own]:
        raise UserError(
            f"--alternatives {config.data.alternatives}: the original model writes no other answer to "
            f"{first_of(without)}: write one yourself, into a column that --alternative-column "
            "names, or leave these rows out."
        )
    _write(path, [{"alternatives": own} for own in answers], "--alternatives self")


def _at_once(config: RunConfig, prompts: Sequence[Prompt]) -> int:
    """How many texts are written together."""
    return at_once(config.output.eval_batch_size, len(prompts), config.memory.stream_weights)


def _let_write(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    take: Callable[[int, Sequence[int]], bool],
    rounds: int,
    batch_size: int,
    description: str,
) -> None:
    """Draws a continuation of each prompt, and again of those of which `take`, which gets its place and its ids, does
    not say that it has enough."""
    missing = list(range(len(prompts)))
    for attempt in range(rounds):
        drawn = sampled_answers(
            model,
            tokenizer,
            [prompts[index] for index in missing],
            samples=1,
            seed=SEED + attempt,
            places=missing,
            batch_size=batch_size,
            description=description,
        )
        missing = [index for index, (ids,) in zip(missing, drawn, strict=True) if not take(index, ids)]
        if not missing:
            return


def _write(path: Path, lines: Sequence[dict[str, Any]], option: str) -> None:
    try:
        make_directory(path.parent)
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), private=True)
    except OSError as error:
        raise UserError(
            f"{option}: '{path}' cannot be written ({error.strerror}); set HF_HOME to another place."
        ) from error
