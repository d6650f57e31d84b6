"""`lowmem-npo data`: what is in the files, as a run would read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from annotated_types import Interval

from lowmem_npo.commands.arguments import check_inputs, parse_options
from lowmem_npo.commands.spellings import join_sources
from lowmem_npo.config import DataConfig, DataOptions, ModelConfig, ModelOptions
from lowmem_npo.errors import UserError
from lowmem_npo.files import expanded
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.ranges import MOST, Count, CountOrNone
from lowmem_npo.sizes import counted
from lowmem_npo.sources import data_names, named_twice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.data import Example, Rows, TokenizedRows

LISTED = 5  # pairs of rows that are printed
PAIRS_OF_SETS = 10  # that are printed, whatever they share; of more, those that share most
BINS, BAR = 8, 40  # lines of a histogram, and the characters of its longest bar
SHOWN = 160  # characters of a text that is printed


@dataclass
class DataCommand(DataOptions, ModelOptions):
    """Look at data as a run would read it; nothing is trained or written.

    Prints for each set what was recognised (columns, rows, their form), how long the rows are, and which are there
    twice; between sets the rows that are in both, and near-duplicates. With --model, lengths are in its tokens, it is
    counted what --max-length cuts, and the model is asked for a few of the rows.
    """

    files: tyro.conf.Positional[tuple[str, ...]] = field(default=(), kw_only=True)
    """Files, folders or hub names, each a set of its own; or name them with --forget, --retain and --holdout."""
    model: str | None = None
    """Hub name or local directory of the model whose tokenizer counts, and which is asked. Without it, words count."""
    max_length: Annotated[int, Interval(ge=2, le=MOST)] = DataConfig.max_length
    """Tokens per row, as in training: what is longer is counted as cut."""
    limit: Count | None = None
    """Look only at the first N rows of each set."""
    ask: CountOrNone = 3
    """Rows of each set that the model of --model is asked for; 0: its weights are not loaded."""
    near: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Jaccard similarity, of runs of 5 characters, from which two rows are called near-duplicates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := named_twice(self.files):
            raise UserError(f"{twice}; name it once, or as --forget and --retain, to see what both have.")
        if not self.sources:
            raise UserError("There is nothing to look at: name a file, as in `lowmem-npo data forget.jsonl`.")

    @property
    def sources(self) -> dict[str, str]:
        """The title of each set, and where it is."""
        named = {part: source for part in ("forget", "retain", "holdout") if (source := getattr(self, part))}
        return {
            **{f"{part}: {source}": source for part, source in named.items()},
            **{file: file for file in self.files},
        }


@dataclass(frozen=True)
class Set:
    """One set, read. tokenized: in the model's tokens, if there is a model. notes: on what its rows hold."""

    title: str
    rows: Rows
    examples: list[Example]
    tokenized: TokenizedRows | None
    notes: list[str] = field(default_factory=list)


@dataclass
class Shared:
    """The rows that two sets share, or that are in one set twice, and those that are nearly the same.

    number: of pairs, among them `same`. most: the most similar ones, as places in either set, the similarity, and
        whether they are the same: texts that repeat themselves may have all their runs in common and differ.
    """

    same: int = 0
    number: int = 0
    most: list[tuple[int, int, float, bool]] = field(default_factory=list)

    def add(self, i: Any, j: Any, similarity: Any, same: Any) -> None:
        """Pairs of rows, as arrays: of many rows there may be more than memory has room for."""
        import numpy as np

        self.same, self.number = self.same + int(same.sum()), self.number + len(similarity)
        first = np.lexsort((j, i, -similarity, ~same))[:LISTED]
        self.most += zip(*(array[first].tolist() for array in (i, j, similarity, same)), strict=True)
        self.most = sorted(self.most, key=lambda pair: (not pair[3], -pair[2], pair[:2]))[:LISTED]

    def lines(self, one: Set, other: Set) -> Iterator[str]:
        near = self.number - self.same
        yield f"  {counted(self.same, 'pair')} of rows the same, {counted(near, 'pair')} nearly the same"
        for i, j, similarity, same in self.most:
            kind = "the same" if same else f"similarity {similarity:.2f}"
            yield f"    {one.examples[i].where} and {other.examples[j].where}: {kind}"
        if self.number > LISTED:
            yield f"    and {self.number - LISTED} more"


def main(arguments: Sequence[str]) -> None:
    options = parse_options(DataCommand, join_sources(arguments), "data")
    check_inputs(options.model, *options.sources.values(), revision=options.revision)
    inspect(options)


def inspect(options: DataCommand) -> None:
    """Prints what is in the sets.

    Raises:
        UserError: something the user can fix, in one sentence.
    """
    names = [name for source in options.sources.values() for name in data_names(source)]
    if options.model or not all(expanded(name).exists() for name in names):
        quiet_libraries()  # files are read without them, at once
    from lowmem_npo.data.conversations import differing_prompts
    from lowmem_npo.data.passages import Passages
    from lowmem_npo.data.schemas import check_some_have
    from lowmem_npo.data.templates import Template

    tokenizer, template, positions = None, Template.of(options), None
    config = options.model_config() if options.model else None
    if config is not None:
        from lowmem_npo.data.fit import positions_of
        from lowmem_npo.model import load_tokenizer, resolve_name
        from lowmem_npo.model.loading import load_config
        from lowmem_npo.model.stop_tokens import stop_tokens
        from lowmem_npo.model.trial import check_architecture

        config.model = resolve_name(config.model, config.revision, print)
        tokenizer = load_tokenizer(config)
        architecture = load_config(config)
        if options.ask:
            check_architecture(architecture)
        template, positions = Template.of(options, stop_tokens(config, architecture)), positions_of(architecture)
    passages = Passages.of(options, tokenizer)
    of_model = tokenizer, template, positions
    sets = [_read(title, source, options, passages, *of_model) for title, source in options.sources.items()]
    forget, retain = (
        next((one for one in sets if one.title == f"{part}: {getattr(options, part)}"), None)
        for part in ("forget", "retain")
    )
    if forget and retain:
        forget.notes.extend(differing_prompts(forget.examples, retain.examples, template, tokenizer))
    columns = dict.fromkeys(of for one in sets if not one.rows.mixed for of in one.rows.columns)
    check_some_have(columns, options.prompt_column, options.answer_column)
    shared = _shared(sets, options.near)
    for place, one in enumerate(sets):
        print("\n".join(_described(one, options, tokenizer, template)))
        print("\n".join(shared[place, place].lines(one, one)) + "\n")
    both = list(combinations(range(len(sets)), 2))
    if len(both) > PAIRS_OF_SETS:
        sharing = sorted((pair for pair in both if shared[pair].number), key=lambda pair: -shared[pair].number)
        print(f"{len(sharing)} of {len(both)} pairs of sets share rows, or have some that are nearly the same\n")
        both = sharing[:PAIRS_OF_SETS]
    for a, b in both:
        print("\n".join([f"{sets[a].title} and {sets[b].title}", *shared[a, b].lines(sets[a], sets[b])]) + "\n")
    if config is not None and tokenizer is not None and options.ask:
        from lowmem_npo.data.fit import check_fit

        check_fit(architecture, tokenizer, [one.tokenized for one in sets], print)
        print("\n".join(_answers(sets, config, tokenizer, options.ask)))


def _read(
    title: str, source: str, options: DataCommand, passages: Any, tokenizer: Any, template: Any, positions: Any
) -> Set:
    from lowmem_npo.data import read_rows, to_examples, tokenize
    from lowmem_npo.data.conversations import earlier_answers

    columns = {"prompt_column": options.prompt_column, "answer_column": options.answer_column}
    rows = read_rows(source, limit=options.limit, passages=passages, columns=columns.values())
    reworded = options.paraphrase_column if source == options.forget else None
    examples = to_examples(rows, **columns, paraphrase_column=reworded, or_recognised=True)
    forgets = source not in (options.retain, options.holdout)
    notes = list(earlier_answers(examples)) if forgets else []
    if tokenizer is None:
        return Set(title, rows, examples, None, notes)
    length = options.max_length
    tokenized = tokenize(examples, tokenizer, max_length=length, template=template, positions=positions)
    return Set(title, rows, examples, tokenized, notes)


def _described(one: Set, options: DataCommand, tokenizer: Any, template: Any) -> Iterator[str]:
    """What was recognised, and how long the rows are."""
    from lowmem_npo.data.prepare import kinds, origin

    known = [template.describe(example, tokenizer) for example in kinds(one.examples)] if tokenizer else []
    yield one.title
    yield f"  {counted(len(one.examples), 'row')}, {origin(one.rows, one.examples, ', or '.join(dict.fromkeys(known)))}"
    yield from (f"  {note}" for note in (*one.rows.notes, *one.notes))
    if options.passages is None and any(example.continues for example in one.examples) and tokenizer is None:
        yield "  passages were cut by words; with --model, by its tokens"
    prompts = [len(example.prompt.split()) for example in one.examples if example.prompt is not None]
    answers = [len(example.answer.split()) for example in one.examples]
    if prompts:
        yield f"  prompts: {_spread(prompts)}; answers: {_spread(answers)}"
    if one.tokenized is None:
        yield "  words of a row, prompt and answer"
        yield from histogram([len(f"{example.prompt or ''} {example.answer}".split()) for example in one.examples])
    else:
        yield "  tokens of a row, prompt, answer and EOS"
        whole = zip(one.tokenized, one.tokenized.cut, strict=True)
        yield from histogram([len(row["input_ids"]) + cut for row, cut in whole])
        yield from (f"  {note}" for note in one.tokenized.notes)


def _spread(numbers: Sequence[int]) -> str:
    if min(numbers) == max(numbers):
        return f"{counted(numbers[0], 'word')}{' each' if len(numbers) > 1 else ''}"
    return f"{min(numbers):,} to {max(numbers):,}, median {median(numbers):,g} words"


def histogram(numbers: Sequence[int]) -> Iterator[str]:
    """How often numbers occur, in at most `BINS` bins of equal width, as lines of text."""
    width = max(1, -(-(max(numbers) - min(numbers) + 1) // BINS))
    first = min(numbers)
    counts = [0] * ((max(numbers) - first) // width + 1)
    for number in numbers:
        counts[(number - first) // width] += 1
    digits = len(str(max(numbers)))
    for place, count in enumerate(counts):
        begin, end = first + place * width, first + (place + 1) * width - 1
        label = f"{begin:>{digits}}" + (f"-{end:<{digits}}" if width > 1 else "")
        yield f"    {label}  {'#' * -(-count * BAR // max(counts)):<{BAR}}  {count}"


def _shared(sets: Sequence[Set], near: float) -> defaultdict[tuple[int, int], Shared]:
    """(place of a set, place of another, or the same) -> what they share. All are compared at once, however many."""
    import numpy as np

    lengths = [len(one.examples) for one in sets]
    of_row = np.repeat(np.arange(len(sets)), lengths)
    starts, mixed = np.cumsum([0, *lengths]), np.array([one.rows.mixed for one in sets])
    examples = [example for one in sets for example in one.examples]
    schemas = np.array([example.schema for example in examples])
    result: defaultdict[tuple[int, int], Shared] = defaultdict(Shared)
    for i, j, similarity, same in _pairs(examples, near):
        a, b = of_row[i], of_row[j]
        meant = (a == b) & mixed[a] & (schemas[i] != schemas[j])  # a passage, as a completion and as a text
        for one, other in np.unique(np.stack([a, b])[:, ~meant], axis=1).T.tolist():
            here = (a == one) & (b == other) & ~meant
            result[one, other].add(i[here] - starts[one], j[here] - starts[other], similarity[here], same[here])
    return result


def _pairs(examples: Sequence[Example], near: float) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Pairs of rows that are the same or nearly so, many at a time, as arrays: the place of either, the earlier first,
    the similarity, and whether they are the same, as in a run."""
    import numpy as np

    from lowmem_npo.data.overlap import first_alike, keys_of, near_duplicates, texts_of

    said = [texts_of(example) for example in examples]
    numbers: dict[str, int] = {}
    whole, bare, end = np.array([[numbers.setdefault(text, len(numbers)) for text in of] for of in said]).T

    def same(i: Any, j: Any) -> Any:
        return (whole[i] == whole[j]) | (bare[i] == bare[j]) | (bare[i] == end[j]) | (end[i] == bare[j])

    for i, j, similarity in near_duplicates(examples, at_least=near):
        here = ~same(i, j) | (whole[i] == whole[j])  # what is the same but for earlier turns comes below
        i, j = i[here], j[here]
        yield i, j, similarity[here], whole[i] == whole[j]
    alike = np.array(first_alike(keys_of(examples)))
    order = np.argsort(alike, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(alike[order])) + 1):
        for i in rows if len(set(whole[rows].tolist())) > 1 else ():
            j = rows[(rows > i) & (whole[rows] != whole[i]) & same(i, rows)]
            yield np.full_like(j, i), j, np.ones(len(j)), np.ones(len(j), dtype=bool)


def _answers(
    sets: Sequence[Set], config: ModelConfig, tokenizer: PreTrainedTokenizerBase, number: int
) -> Iterator[str]:
    """What the model says of the first rows of each set."""
    from lowmem_npo.evaluation.answers import evaluate_answers
    from lowmem_npo.evaluation.figures import shares
    from lowmem_npo.model import load_model

    model = load_model(config)
    for one in sets:
        assert one.tokenized is not None
        yield f"What the model says: {one.title}"
        for record in evaluate_answers(model, tokenizer, one.tokenized[:number], progress=False).records:
            example = one.tokenized.examples[record.row]
            yield f"  {example.where}"
            for name, text in (
                ("asked", example.prompt or record.prompt),
                ("true", record.reference),
                ("says", record.answer),
            ):
                yield f"    {name:<6} {_short(text)}"
            yield f"    {shares(record.rouge_l_recall)[0]} of the true answer is in it (ROUGE-L recall)"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
