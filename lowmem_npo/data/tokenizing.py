"""From examples to token ids and labels, with the boundary where generation will have it.

A row is `prompt ids + answer ids + EOS`. The prompt ids are what the tokenizer gives for the prompt alone, special
tokens (a BOS, where the tokenizer writes one) included: exactly what generation starts from. The answer ids are what
the tokenizer writes after it in the joined text. Labels are the ids themselves, -100 where nothing is learnt; they are
not shifted. Position 0 is never labelled: no context predicts the first token of a sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lowmem_npo.config import DataConfig
from lowmem_npo.data.chat import MARK, ChatTemplate
from lowmem_npo.data.example import Example
from lowmem_npo.data.openings import already_written, is_unthinking, opened, squeezed, without_opening
from lowmem_npo.data.refused import RowRefused, refuse_all
from lowmem_npo.data.special_texts import INSIDE, SpecialTexts, check_marks, trailing
from lowmem_npo.data.templates import Template, end_of_turn, special_tokens
from lowmem_npo.data.tokenized_rows import IGNORE_INDEX, TokenizedRow, TokenizedRows
from lowmem_npo.data.turns import CALLS, SYSTEM
from lowmem_npo.errors import UserError, one_line
from lowmem_npo.progress import Progress
from lowmem_npo.sizes import first_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = ("answer", "all")
# Parts of a conversation that not every chat template knows.
READ = ("tools", *CALLS, "reasoning_content", "reasoning", "thinking")
SHORT = 16  # characters that may stand in a template by chance

DELAY = 2  # seconds after which a bar shows how far it is

Message = Mapping[str, Any]
Render = Callable[..., str]  # the chat template's text of some turns


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = DataConfig.max_length,
    template: Template | None = None,
    tokens: str = DataConfig.tokens,
    drop_too_long: bool = False,
    positions: Callable[[], int | None] | None = None,
) -> TokenizedRows:
    """Tokenises every example.

    max_length: the most tokens a row may have, prompt, answer and EOS together. What exceeds it is cut from the end,
        so the answer loses its tail and its EOS; the prompt is never cut, since evaluation would then ask something
        else.
    tokens: "answer" labels the answer and EOS, "all" the prompt too (padding never).
    drop_too_long: leave out a row without room for any of its answer, unless that is all of them, and a text of a
        single token.
    positions: says for how many tokens the model has positions, if that is known; asked where rows are too long.

    Raises UserError when a row has no room for any of its answer and is not left out, for a text of a single token,
    for all rows at once that cannot be written, when the tokenizer has no EOS token, or for a conversation when the
    tokenizer has no chat template.
    """
    if tokens not in TOKENS:
        raise UserError(f"tokens is {tokens!r}; it must be one of {', '.join(TOKENS)}.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token, with which every answer ends; set eos_token in its files.")
    encoder = Encoder(tokenizer, template)
    rows, kept_examples, too_long, refused = list[TokenizedRow](), [], [], list[RowRefused]()
    with Progress(len(examples), "tokenising", "row", delay=DELAY) as bar:
        for example in examples:
            bar.update()
            try:
                prompt, answer = encoder.encode(example)
            except RowRefused as error:
                refused.append(error)
                continue
            whole = prompt + answer
            if not prompt and len(answer) <= 2 - example.continues:  # only its EOS would be learnt
                if drop_too_long:
                    continue
                raise single_token(example.where)
            kept = whole[:max_length]
            first_label = max(len(prompt) if tokens == "answer" else 0, 1)
            # A text without prompt still needs one token that something precedes.
            if len(kept) <= max(len(prompt), 1):
                too_long.append((example, len(prompt)))
                continue
            labels = [IGNORE_INDEX] * first_label + kept[first_label:]
            rows.append(TokenizedRow(input_ids=kept, labels=labels, prompt_length=len(prompt)))
            kept_examples.append(example)
            if len(kept) < len(whole):
                rows[-1]["cut"] = len(whole) - len(kept)
    refuse_all(refused, len(examples))
    without_answer = too_long and not (drop_too_long and rows)
    is_cut = any("cut" in row for row in rows)
    most = positions() if positions is not None and (without_answer or is_cut) else None
    if without_answer:
        _refuse(too_long, max_length, most)
    return TokenizedRows(rows, kept_examples, max_length, encoder.repeated, encoder.literal, most, encoder.unthinking)


def single_token(where: str) -> UserError:
    return UserError(
        f"{where} is a text of a single token, which nothing precedes that could predict it: lengthen it, or remove "
        "the row."
    )


class Encoder:
    """Examples as ids, in the words of one tokenizer and one template.

    An answer ends with the token at which generation stops: the tokenizer's EOS, one that the model's own configuration
    names (`Template.stops`), or, in a chat template, any special token that follows the content. A row may bring its
    end, as the text of any token at which an answer of this model can end.

    repeated: how many examples brought a special token that the tokenizer or the template writes as well.
    literal: how many hold the text of one as text (`lowmem_npo.data.special_texts`).
    unthinking: how many ask a model that can think for an answer without that.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None = None):
        template = template or Template()
        self.tokenizer, self.template, self.chat = tokenizer, template, ChatTemplate(tokenizer, template.date)
        self.repeated, self.doubled, self.ended = 0, False, False
        self.literal = self.unthinking = 0
        named = {number: decode(tokenizer, [number]) for number in (tokenizer.eos_token_id, *template.stops)}
        self.stops = special_tokens(tokenizer) | named
        texts = sorted(filter(str.strip, self.stops.values()), key=len, reverse=True)
        self.stop = "|".join(map(re.escape, texts))
        self.named = [text for text in named.values() if text.strip()]
        turn = end_of_turn(tokenizer)
        self.ends = self.named if turn is None else [*self.named, self.stops[turn]]
        self.special = SpecialTexts(tokenizer, self.stops, self.ends)
        self.prefix = self._ids("", special=True)

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids with EOS or the end of the turn last unless the text continues), not truncated; text
        has no prompt ids."""
        self.doubled = self.ended = False
        texts = [example.prompt, example.answer, example.messages, example.options]
        check_marks(example.where, json.dumps(texts, ensure_ascii=False, default=str))
        prompt, answer = self._encode(example)
        self.repeated += self.doubled
        if example.continues:
            return prompt, answer
        ended = self.ended and answer[-1] in self.stops
        return prompt, answer if ended else [*answer, self.tokenizer.eos_token_id]

    def _encode(self, example: Example) -> tuple[list[int], list[int]]:
        if (messages := self.template.messages(example, self.tokenizer)) is not None:
            return self._conversation(messages, example)
        example = self._marked(example)
        if not self.template.for_schema(example.schema).startswith("{prompt}"):
            example = replace(example, prompt=self._without_bos(example.prompt))
        prompt, answer = ("", example.answer) if example.prompt is None else self.template.render(example)
        if (brought := trailing(answer, self.ends)) < len(answer):  # the row brings its own end
            _check_left(answer[:brought], answer[brought:], example.where)
            self.doubled, self.ended, answer = True, True, answer.rstrip()
        if example.prompt is None:
            return [], self._begun(answer)
        prompt_ids = self._begun(prompt)
        return prompt_ids, self._continuation(prompt_ids, self._begun(prompt + answer), answer, example.where)

    def _marked(self, example: Example) -> Example:
        """The example for a plain form, with marks in the texts of special tokens that are its own."""
        special, prompt, answer = self.special, example.prompt, example.answer
        whole = example.prompt is None  # text, which has nothing before it
        if not (whole and special.is_written_out(answer, whole=True)):
            answer = special.marked(answer, keep_bos=whole, keep_end=True)
        if prompt is not None and not special.is_written_out(prompt, whole=False):
            prompt = special.marked(prompt, keep_bos=True)
        marked = replace(example, prompt=prompt, answer=answer)
        if marked != example:
            self._count_literal(example, not special.are_separable)
        return marked

    def _count_literal(self, example: Example, is_refused: bool) -> None:
        self.literal += 1
        if is_refused:
            raise UserError(
                f"{example.where} holds the text of a special token, which this model's tokenizer or chat template "
                "reads as its own: remove it, or write it otherwise."
            )

    def _conversation(self, messages: Sequence[Message], example: Example) -> tuple[list[int], list[int]]:
        """The chat template's own text: everything up to the assistant's last turn is the prompt."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{example.where} is a conversation, but this model's tokenizer has no chat template; "
                "use an instruction-tuned model, or rows with a prompt and an answer column."
            )
        *earlier, last = messages
        if example.messages is None:
            earlier[-1] = {**earlier[-1], "content": self._without_bos(earlier[-1]["content"])}
            messages = [*earlier, last]
        options, special, refused = example.options, self.special, False

        def render(turns: Sequence[Message], **more: Any) -> str:
            return self._render(turns, example, {**options, **more})

        own = special.marked(last["content"], keep_end=True)
        marked = [*special.marked_all(earlier), {**special.marked_all(last), "content": own}]
        if marked != [*messages] or special.marked_all(options) != options:
            unmarked = render(messages)
            (*earlier, last), messages, options = marked, marked, special.marked_all(options)
            refused = not special.are_separable or render(messages).replace(INSIDE, "") != unmarked
        prompt, whole = render(earlier, add_generation_prompt=True), render(messages)
        _check_written(render, messages, example, prompt, whole)
        plain = render([*earlier, {"role": "assistant", "content": MARK}])
        asked, prompt = prompt, opened(prompt, whole, plain)
        body, ending = self._answer_in(plain, last, prompt, whole)
        if example.continues:
            ending = ""
        else:
            body, ending = self._ended(render, earlier, body, ending, example.where)
        answer = body + ending
        self.unthinking += is_unthinking(prompt, answer)
        written = None
        if not example.messages:
            given, question = example.prompt or "", earlier[-1]["content"].strip()
            written = already_written(given, prompt, question)
            if not written and (written := already_written(given, asked, question)):
                written += prompt[len(asked) :]
        if INSIDE in (written or prompt) + answer:
            self._count_literal(example, refused)
        if written:
            self.doubled = True
            prompt_ids, joined = self._begun(written), self._begun(written + answer)
        else:  # the template writes special tokens itself
            prompt_ids, joined = self._ids(prompt), self._ids(prompt + answer)
        return prompt_ids, self._continuation(prompt_ids, joined, answer, example.where)

    def _answer_in(self, plain: str, last: Message, prompt: str, whole: str) -> tuple[str, str]:
        """The last turn's text in `whole`, and what the template ends it with: what it makes of the content, unless it
        begins with another text than generation (an opening <think> that the content may bring as well) or loses some
        of the content (reasoning). plain: the conversation with MARK for the last turn's content."""
        ending = plain.rpartition(MARK)[2] if MARK in plain else ""
        content = without_opening(last["content"], prompt)
        answer = whole.removeprefix(prompt)
        if not whole.startswith(prompt) or squeezed(content) not in squeezed(answer):
            answer = content + ending
        if not answer.endswith(ending):  # a turn of another kind, such as a call of a tool
            ending = cast(re.Match, re.search(f"({self.stop}|\\s)*$", answer))[0]
        return answer.removesuffix(ending), ending

    def _ended(self, render: Render, earlier: Sequence[Message], body: str, ending: str, where: str) -> tuple[str, str]:
        """The answer without an end of its own, and the template's `ending` up to where generation stops."""
        ends = self.ends
        if not re.search(self.stop, ending):  # GLM ends a turn with the token that opens the user's next one
            with suppress(UserError):  # of a template that wants another turn next
                next_turns = [{"role": "assistant", "content": MARK}, {"role": "user", "content": "?"}]
                following = render([*earlier, *next_turns]).rpartition(MARK)[2].removeprefix(ending)
                at_once = re.match(rf"\s*({'|'.join(map(re.escape, self.named))})", following)
                ending += at_once[0] if at_once else ""
        if stop := re.search(self.stop, ending):
            self.ended, ending, ends = True, ending[: stop.end()], [*ends, stop[0]]
        if (brought := trailing(body, ends)) < len(body):  # the row brings its own end
            _check_left(body[:brought], body[brought:], where)
            self.doubled, body = True, body[:brought]
        return body, ending

    def _without_bos(self, prompt: str | None) -> str | None:
        """A prompt around which more is written: where the text begins is no longer its own matter."""
        bos = self.tokenizer.bos_token
        if not (prompt and bos and prompt.startswith(bos)):
            return prompt
        self.doubled = True
        return prompt.removeprefix(bos)

    def _render(self, messages: Sequence[Message], example: Example, options: Mapping[str, Any]) -> str:
        try:
            return self.chat.write(messages, **options)
        except Exception as error:
            reason = one_line(error).rstrip(".")
            instead = "" if example.messages else ", or give --template plain"
            raise RowRefused(
                example.where,
                f"{example.where}: the model's chat template cannot write this row ({type(error).__name__}: {reason}); "
                f"change the row or the template{instead}.",
            ) from error

    def text_ids(self, text: str, *, whole: bool = True) -> list[int]:
        """Ids of a row's text, with the special tokens that the tokenizer puts in front by itself, once; none at the
        end. whole: not a prompt, which no token ends."""
        marked = text
        if not self.special.is_written_out(text, whole=whole):
            marked = self.special.marked(text, keep_bos=True, keep_end=whole)
        return self._begun(marked if marked == text or self.special.are_separable else text)

    def _begun(self, text: str) -> list[int]:
        """As `text_ids`, of a text in which what is no special token is marked."""
        ids, prefix = self._ids(text, special=True), self.prefix
        if prefix and ids[: 2 * len(prefix)] == prefix * 2:  # the text brings them as well
            self.doubled, ids = True, ids[len(prefix) :]
        return ids

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. special: with what the tokenizer puts in front by itself; never with what it appends."""
        tokenizer = self.tokenizer
        if INSIDE in text:
            ids = self.special.ids(text, special)
        else:
            ids = list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
        if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids.pop()  # a tokenizer that appends EOS by itself: it belongs after the answer, not after the prompt
        return ids

    def _continuation(self, prompt_ids: list[int], joined: list[int], answer: str, where: str) -> list[int]:
        """The ids that follow `prompt_ids` so that both together read as `joined` does.

        Nearly always `joined` begins with `prompt_ids` and the rest is the answer. Where a token would straddle the
        boundary ("un" + "able"), generation cannot produce it, so the answer is tokenised on its own. Tokenisers of the
        SentencePiece family put a space in front of whatever they are given, but not after a line break.
        """
        if joined[: len(prompt_ids)] == prompt_ids:
            return joined[len(prompt_ids) :]
        break_ids, text = self._ids("\n"), decode(self.tokenizer, joined)
        for candidate in (self._ids(answer), self._ids("\n" + answer)[len(break_ids) :]):
            if decode(self.tokenizer, prompt_ids + candidate) == text:
                return candidate
        raise RowRefused(
            where,
            f"{where}: the tokenizer cannot write this answer after this prompt without changing the text; "
            "end the prompt at a word boundary, or give --template.",
        )


def _check_left(answer: str, end: str, where: str) -> None:
    """Raises UserError where `end` is all that a row has for an answer: there would be nothing to forget or to keep."""
    if not answer.strip():
        raise UserError(
            f"{where}: nothing is left of the answer before {end.strip()}, at which an answer of this model ends; "
            "write what is to be said before it, or remove the row."
        )


def _check_written(render: Render, messages: Sequence[Message], example: Example, prompt: str, whole: str) -> None:
    """Raises RowRefused where the template drops what the row has: it must reach the model."""
    *earlier, last = messages
    dropped = []
    for name in READ:
        if name == "tools" and name in example.options:
            unread = render(messages, tools=None)
        elif name in last or (name in CALLS and any(name in turn for turn in messages)):
            unread = render([{key: turn[key] for key in turn if key != name} for turn in messages])
        else:
            continue
        if unread == whole:
            dropped.append(name)
    if dropped:
        raise RowRefused(
            example.where,
            f"{example.where}: the model's chat template does not write {', nor '.join(dropped)}; write it into the "
            "content of a turn, or remove it from the row.",
        )
    said = [squeezed(turn["content"]) for turn in earlier]
    all_said, written = "\n".join(said), squeezed(prompt)
    ask = partial(render, add_generation_prompt=True)
    for place, content in enumerate(said):
        # Counted, since another turn may say the same; looked for first, since writing the turns anew takes long. The
        # template's own words hold many a short one, such as the result of a tool.
        role = earlier[place]["role"]
        by_chance = len(content) < SHORT and role not in ("user", "assistant", *SYSTEM)
        doubtful = by_chance or written.count(content) < all_said.count(content)
        if content and doubtful and not _reads(ask, earlier, place, prompt):
            raise _unwritten(example, role)
    beside_call = any(last.get(call) for call in CALLS) and squeezed(last["content"]) not in squeezed(whole)
    if beside_call and not _reads(render, messages, len(earlier), whole):
        raise _unwritten(example, last["role"])


def _reads(render: Render, turns: Sequence[Message], place: int, text: str) -> bool:
    """Whether `text`, which is what the template makes of `turns`, depends on what is said at `place`."""
    with suppress(UserError):  # of a template that wants something else there
        return render([*turns[:place], {**turns[place], "content": MARK}, *turns[place + 1 :]]) != text
    return True


def _unwritten(example: Example, role: str) -> RowRefused:
    what, remedy = f"what {role!r} says", "write it into the content of another turn, or remove it from the row"
    if role in SYSTEM:
        what, remedy = "the system prompt", "leave out --system, or, where a run has it, give --system ''"
        if any(turn["role"] in SYSTEM for turn in example.messages or ()):
            remedy = "write it into the content of a turn, or remove it from the row"
    elif not example.messages:
        remedy = "give --template plain, or another model"
    where = example.where
    return RowRefused(where, f"{where}: the model's chat template does not write {what}; {remedy}.")


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The exact text of `ids`, special tokens included."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _refuse(too_long: list[tuple[Example, int]], max_length: int, most: int | None) -> None:
    listed = first_of([f"{example.where} (prompt of {length} tokens)" for example, length in too_long])
    needed = max(length for _, length in too_long) + 2
    if most is not None and needed > most:
        raise UserError(
            f"With --max-length {max_length} nothing of the answer is left in {listed}, and the model has positions "
            f"for {most} tokens; shorten the prompts that are longer, or remove these rows."
        )
    raise UserError(
        f"With --max-length {max_length} nothing of the answer is left in {listed}; "
        f"give --max-length {needed} or more, or remove these rows."
    )
