"""Which rows, and how they are read, written as prompts and tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from lowmem_npo.ranges import MOST, Checked, Count, MaybeEmpty

PassageForm = Literal["both", "completion", "text"]


@dataclass
class DataOptions(Checked):
    """Which rows, and how they are read and written as prompts: for every command that reads any."""

    forget: str | None = None
    """What to forget: rows in a .jsonl, .json, .csv, .tsv or .parquet file, documents (.txt, .md, .html, .pdf, or a
    folder of them), several files, or a hub name such as locuslab/TOFU:forget05. Without any data a small bundled set
    of invented biographies is used."""
    retain: str | None = None
    """What to keep, given in the same way, or builtin (general questions and texts, the default where only --forget is
    given), or self:N (N texts that the original model writes itself). self alone: 64 texts."""
    holdout: str | None = None
    """Rows like those to forget that the model was never taught, given in the same way: --stop-when and the leak tests
    compare the forget rows with them. They are never trained on. The bundled data has its own."""
    prompt_column: str | None = None
    """Column of the prompt. Not needed for input/output, question/answer, prompt/completion, messages and text."""
    answer_column: str | None = None
    """Column of the answer."""
    paraphrase_column: str | None = None
    """Column of the forget rows with the prompt in other words or another language, or a list of them, in which the
    rows are asked for as well (--forms), and the holdout by leak tests, where it has it. Default: paraphrased_question,
    or the like of another prompt column but `instruction`, if there is one."""
    template: str | None = None
    """How a prompt is written before its answer. chat: with the model's chat template. plain: 'Question:
    {prompt}\\nAnswer:' for question/answer columns, else the prompt as it is. auto: chat where the model has a chat
    template, but plain for input/output and prompt/completion columns. both: as auto, and what the chat template writes
    a second time as plain, so that it is forgotten in both forms: twice as many rows. Or a text such as '[INST]
    {prompt} [/INST]'."""
    system: MaybeEmpty | None = None
    """System prompt of rows that the chat template writes and that bring none."""
    chat_date: str = "auto"
    """What a chat template that writes today's date takes for it, such as 2026-11-24. auto: the day on which the run
    began."""
    passage_tokens: Annotated[int, Interval(ge=8, le=MOST)] | None = None
    """Tokens of a passage, of those into which documents are cut; each overlaps the next by half. Default: 128."""
    passages: PassageForm | None = None
    """What a passage of a document becomes: its second half as the completion of its first (completion), a text
    (text), or both, the default."""


@dataclass
class DataConfig(DataOptions):
    """Data: what to forget, what to keep, and how it is tokenised."""

    template: str = "auto"
    passage_tokens: Annotated[int, Interval(ge=8, le=MOST)] = 128
    passages: PassageForm = "both"
    max_length: Annotated[int, Interval(ge=2, le=MOST)] = 1024
    """Tokens per row, prompt and answer together; truncated rows are counted and reported."""
    tokens: Literal["answer", "all"] = "answer"
    """Which tokens count in the loss: the answer's (EOS included), or every non-padding token."""
    refusal: str = "I don't know."
    """The answer taught in place of the forgotten one by --forget-term idk and jensun."""
    alternative_column: str | None = None
    """Column of the forget rows with another answer, or a list of them, which --forget-term dpo prefers to the
    forgotten one."""
    alternatives: str | None = None
    """self: let the original model write the other answers that --forget-term dpo prefers (AltPO, Mekala et al. 2025),
    5 to each forget row, of which every epoch takes the next; self:N writes N."""
    group_column: str | None = None
    """Column of the forget rows that says what each is about, such as a person: --layered keeps those of a group
    together, and to leak tests they are one piece of evidence, as are those of a holdout that has it. Default: every
    row by itself, but for equal ones and the passages of a document."""
    allow_overlap: bool = False
    """Continue even if rows of the forget set are in the retain set as well."""
    limit: Count | None = None
    """Use only the first N rows of each set."""
