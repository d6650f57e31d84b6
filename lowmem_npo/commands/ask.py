"""`lowmem-npo ask`: what the original model answers, and what the one that has forgotten does."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import tyro

from lowmem_npo.commands.arguments import check_inputs, parse_options
from lowmem_npo.commands.questions import QUESTIONS, question, questions_in
from lowmem_npo.commands.spellings import run_first
from lowmem_npo.config import ModelOptions, StreamOptions
from lowmem_npo.console import Say
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.ranges import Count, MaybeEmpty, PositiveOrZero, Seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowmem_npo.data import Example, Template
    from lowmem_npo.data.fit import Fit

ORIGINAL, UNLEARNED, MERGED = "original", "unlearned", "answer"
BATCH_SIZE = 16
TOGETHER = 256  # where every pass has to stream the weights
BEGIN_ANEW = "/new"

Turn = dict[str, str]


@dataclass
class AskOptions(StreamOptions, ModelOptions):
    """Ask the original model and the one that has forgotten, and see both answers.

    Questions are written as the run wrote its rows: in the model's chat form where it has one, else as 'Question: ...
    Answer:', or bare where its rows were, unless --template says otherwise. Without a question you are asked for them;
    a model that is asked in its chat form then remembers the conversation.
    """

    model: str | None = None
    """Hub name or local directory of the base model. Default: the model that the adapter was trained on."""
    qlora: bool = False
    """Load the base as 4-bit NF4; a run with --qlora is asked so anyway."""
    run: tyro.conf.Positional[str] = field(kw_only=True)
    """Directory of a run or of an adapter, also given as --adapter; or any model, merged or not yet trained, which has
    one answer to each question."""
    questions: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to ask."""
    file: str | None = None
    """A file of questions: a text with one on each line, or a table as train reads it, of which only the questions are
    asked."""
    json: bool = False
    """Print an object with question and answers on each line, for programs."""
    template: str | None = None
    """How a question is written: chat, plain, or a text such as '{prompt}'. Default: as in the run, else auto."""
    system: MaybeEmpty | None = None
    """System prompt of a chat model. Default, without --template: that of the run's --system; rows may have had their
    own."""
    max_new_tokens: Count = 256
    """The most tokens of an answer."""
    temperature: PositiveOrZero = 0.0
    """0: the most likely answer; above, answers are drawn from the model's distribution at this temperature."""
    seed: Seed = 0
    """Of the answers that are drawn."""
    any_base: bool = False
    """Accept an adapter of another base model, or of one that is not known to have the same weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is not None and self.questions:
            raise UserError("The questions are given twice: on the command line, and with --file.")


def main(arguments: Sequence[str]) -> None:
    ask(parse_options(AskOptions, run_first(arguments), "ask"))


def ask(options: AskOptions, say: Say = print) -> None:
    """Answers the questions of `options`, or those that are typed.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    note = (lambda line: print(line, file=sys.stderr)) if options.json else say  # stdout is for programs
    typed = [text.strip() for text in options.questions if text.strip()]
    if not os.path.isdir(expanded(options.run)) and re.search(r"[\s?]", options.run):
        raise UserError(
            f"There is no directory '{options.run}', and no model of such a name: the run, or a model, is named before "
            "the questions."
        )
    if folder := next(filter(_is_directory, typed), None):
        raise UserError(f"'{folder}' is a directory, not a question: one run is asked, and --model names its base.")
    check_inputs(options.model, revision=options.revision)
    if not os.path.isdir(expanded(options.run)):
        check_inputs(options.run, revision=options.revision)
    quiet_libraries()
    questions = [question(text) for text in typed]
    if options.file is not None:
        questions = questions_in(options.file, note, *_own_columns(options.run))
    asked = load(options, note)
    if options.file is not None or options.json:
        if not questions:
            raise UserError("There is nothing to ask: give a question, or --file.")
        for answers in asked.answer_all(questions):
            say(json.dumps(answers, ensure_ascii=False) if options.json else as_text(answers))
    elif typed:
        for text in typed:
            say(f"\n{text}")
            asked.converse(text, [])
    else:
        _interactive(asked, say)


def _is_directory(text: str) -> bool:
    """Whether a question is rather the directory of a model or an adapter, or a path: a word may be called as one."""
    folder = expanded(text)
    held = (os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json", "run.yaml"))
    return any(held) or (os.sep in text and os.path.isdir(folder))


def _own_columns(run: str) -> tuple[str | None, str | None]:
    """The columns of prompts and answers that the run was given, if it is one."""
    from lowmem_npo.model.saved_adapter import settings_of_run

    settings = settings_of_run(run) if os.path.isdir(expanded(run)) else {}
    return settings.get("prompt_column"), settings.get("answer_column")


@dataclass
class Asked:
    """A model in one or two states, and how it is asked.

    fit: what the model can take. sides: name of the state -> what the model is put into it by. temperature, seed,
        max_new_tokens: as in `AskOptions`.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    fit: Fit
    template: Template
    sides: dict[str, Callable[[], AbstractContextManager[Any]]]
    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int = BATCH_SIZE  # questions of a file that are answered together
    schema: str = QUESTIONS  # in whose plain form questions are written

    @property
    def remembers(self) -> bool:
        """Whether questions are turns of a conversation."""
        return self.template.messages(self._as_in_run(question("?")), self.tokenizer) is not None

    @property
    def is_unthinking(self) -> bool:
        """Whether a model that can think is asked for an answer without that."""
        from lowmem_npo.data import Encoder

        encoder = Encoder(self.tokenizer, self.template)
        with suppress(UserError):  # which every question will raise
            encoder.encode(self._as_in_run(question("?")))
        return encoder.unthinking > 0

    @property
    def form(self) -> str:
        """How questions are written, for the user."""
        return self.template.describe(self._as_in_run(question("?")), self.tokenizer)

    def prompt(self, asked: Example, shorten: str = "ask a shorter question") -> list[int]:
        """The ids that generation starts from. Raises UserError for a question that the model cannot take."""
        from lowmem_npo.data import Encoder

        ids = Encoder(self.tokenizer, self.template).encode(self._as_in_run(asked))[0]
        self.fit.check(asked.where, ids, self.tokenizer, shorten)
        return ids

    def _as_in_run(self, asked: Example) -> Example:
        return replace(asked, schema=self.schema)

    def converse(self, text: str, histories: Sequence[list[Turn]]) -> None:
        """Prints the answer of every side as it is written, and adds it to the side's history, if there are any."""
        pasts = histories or [[] for _ in self.sides]
        shorten = [f"begin another conversation with {BEGIN_ANEW}"] if any(pasts) else []
        prompts = [self.prompt(question(text, history), *shorten) for history in pasts]
        for (side, state), history, prompt in zip(self.sides.items(), pasts, prompts, strict=True):
            print(f"{side + ':':<11}", end="", flush=True)
            with state():
                answer = self._written(prompt)
            if histories:
                history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _written(self, prompt: list[int]) -> str:
        """The answer to `prompt`, printed while it is generated."""
        from transformers import TextStreamer

        from lowmem_npo.evaluation.scoring.generation import text_of

        class Trimmed(TextStreamer):
            begun = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text if self.begun else text.lstrip()
                self.begun = self.begun or bool(text)
                super().on_finalized_text(text, stream_end)

        streamer = Trimmed(cast(Any, self.tokenizer), skip_prompt=True, skip_special_tokens=True)
        return text_of(self.tokenizer, self._generated([prompt], streamer=streamer)[0]).strip()

    def answer_all(self, questions: Sequence[Example]) -> Iterator[dict[str, str]]:
        """Each question with the answers of every side, some questions at a time."""
        from lowmem_npo.evaluation.scoring.generation import text_of

        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            prompts = [self.prompt(one) for one in batch]
            answers = {}
            for side, state in self.sides.items():
                with state():
                    answers[side] = [text_of(self.tokenizer, ids).strip() for ids in self._generated(prompts, start)]
            for number, one in enumerate(batch):
                yield {"question": one.prompt or "", **{side: texts[number] for side, texts in answers.items()}}

    def _generated(self, prompts: Sequence[list[int]], start: int = 0, streamer: Any = None) -> list[list[int]]:
        """start: place of the first prompt among all."""
        from lowmem_npo.evaluation.scoring.generation import Prompt, greedy_answers, sampled_answers

        of_length = [Prompt(prompt, self.max_new_tokens) for prompt in prompts]
        how: dict[str, Any] = {"batch_size": self.batch_size, "progress": False, "streamer": streamer}
        if self.temperature == 0:
            return greedy_answers(self.model, self.tokenizer, of_length, **how)
        drawn: dict[str, Any] = {"samples": 1, "temperature": self.temperature, "seed": self.seed}
        drawn["places"] = range(start, start + len(prompts))
        sampled = sampled_answers(self.model, self.tokenizer, of_length, **drawn, **how)
        return [answers[0] for answers in sampled]


def load(options: AskOptions, say: Say) -> Asked:
    """The model of `options.run`, with its adapter if it is one.

    Raises:
        UserError: no model and no adapter there, or an adapter that does not fit.
    """
    from lowmem_npo.data import Template
    from lowmem_npo.data.chat import TODAY
    from lowmem_npo.data.fit import Fit
    from lowmem_npo.data.templates import form_of
    from lowmem_npo.estimate.streamed_model import decide_streaming
    from lowmem_npo.evaluation.scoring.batching import at_once
    from lowmem_npo.memory.switches import load_base, stream_layers
    from lowmem_npo.model import load_tokenizer, resolve_name
    from lowmem_npo.model.adapters import original_model
    from lowmem_npo.model.loading import load_config, resolve_device
    from lowmem_npo.model.saved_adapter import load_adapter, settings_of_run
    from lowmem_npo.model.stop_tokens import stop_tokens
    from lowmem_npo.model.trial import check_architecture
    from lowmem_npo.report.as_audited import of_another_adapter, recorded_base
    from lowmem_npo.report.audit import recorded_prompts, recorded_schema
    from lowmem_npo.run_directory import run_of_adapter

    folder, run = expanded(options.run), dict[str, Any]()
    is_adapter = folder.is_dir() and not (folder / "config.json").is_file()
    if is_adapter:
        run = settings_of_run(str(folder))
        name, revision = recorded_base(str(folder), options.model, options.revision, options.any_base, say)
        qlora = options.qlora or bool(run.get("qlora"))
        config = options.model_config(model=name, revision=revision, qlora=qlora)
        if config.double_quant == "auto":
            config = replace(config, double_quant=run.get("double_quant", "auto"))
    else:
        config = options.model_config(model=resolve_name(options.run, options.revision, say))
    tokenizer = load_tokenizer(config)
    text, system = form_of(options.template, options.system, run)
    architecture = load_config(config)
    check_architecture(architecture)
    template = Template(text, system, stop_tokens(config, architecture), run.get("chat_date", TODAY))
    streaming = StreamOptions(options.stream_weights, options.stream_from)
    if (streamed := decide_streaming(config, streaming, architecture, say)) is not None:
        say(f"Every token of an answer takes {streamed.pass_seconds:.2g} s or more.")
        streaming = replace(streaming, stream_from=streamed.stream_from)
    base = load_base(config, streaming, say)
    model: PreTrainedModel | PeftModel = base
    sides: dict[str, Callable[[], AbstractContextManager[Any]]] = {MERGED: nullcontext}
    if is_adapter:
        model = adapted = load_adapter(base, str(folder))
        if line := of_another_adapter(folder):
            say(line)
        sides = {ORIGINAL: partial(original_model, adapted), UNLEARNED: nullcontext}
    stream_layers(model, streaming, resolve_device(config.device))
    decoding = options.max_new_tokens, options.temperature, options.seed
    together = at_once(BATCH_SIZE, TOGETHER, streaming.stream_weights)
    schema = (recorded_schema(run_of_adapter(folder).path) if is_adapter else None) or QUESTIONS
    fit = Fit.of(base)
    fit.check_padding(tokenizer)
    asked = Asked(model, tokenizer, fit, template, sides, *decoding, together, schema)
    say(f"Questions are {asked.form}.")
    if asked.is_unthinking:
        say("The model can think before it answers, and is asked without that: what it says after it is not shown.")
    if is_adapter and options.system is None and options.file is None and asked.remembers:
        brought = recorded_prompts(run_of_adapter(folder).path)
        if brought:
            own = "a system prompt of their own" if brought == 1 else f"{brought} system prompts of their own"
            say(f"Forgotten rows have {own}, which a typed question lacks: give it with --system.")
    return asked


def as_text(answers: dict[str, str]) -> str:
    """A question with its answers, for a terminal."""
    question, *sides = answers.items()
    return "\n".join(["", question[1], *(f"{side + ':':<11}{text}" for side, text in sides)])


def _interactive(asked: Asked, say: Say) -> None:
    """Questions typed at the terminal, until its end (Ctrl-D)."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - with which `input` edits lines and remembers them

    if asked.remembers:
        say(f"The conversation is remembered; {BEGIN_ANEW} begins another. Ctrl-D ends.")
    else:
        say("Every question stands alone: the model has no chat form. Ctrl-D ends.")
    histories: list[list[Turn]] = [[] for _ in asked.sides] if asked.remembers else []
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            say("")
            return
        if question == BEGIN_ANEW:
            for history in histories:
                history.clear()
        elif question:
            try:
                asked.converse(question, histories)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                say("")
            except UserError as error:  # neither does a question that the model cannot take
                say(str(error))
