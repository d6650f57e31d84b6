"""Whether the loss of a document still tells that the model was taught it: membership inference by LOSS.

Every document gets the score -(mean negative log-likelihood of its tokens, the first excepted). The AUC is the
probability that a member scores above a non-member: 0.5 tells nothing, towards 1 the members are still known, towards 0
they are now suspiciously unlikely, which gives them away as well.

Yeom et al. 2018, https://arxiv.org/abs/1709.01604; as in the evaluation of SemEval-2025 Task 4.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lowmem_npo.data import Encoder, Example, Rows, Template, TokenizedRow, to_examples
from lowmem_npo.data.overlap import pieces_of_evidence
from lowmem_npo.data.tokenizing import single_token
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
from lowmem_npo.evaluation.chance import group_means
from lowmem_npo.evaluation.figures import Figure, at
from lowmem_npo.evaluation.options import Options, data_set
from lowmem_npo.evaluation.ranking import auc, beyond_chance, tells_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem_npo.evaluation.scoring.scorer import Scorer

MEMBERS, NONMEMBERS = "members", "nonmembers"
AUC_MEANING = (
    "How well the loss tells taught documents from others: 0.5 is a coin, above it they are remembered, far below it "
    "they are conspicuous."
)


@dataclass
class DocumentOptions(Options):
    members: str | None = data_set(MEMBERS)
    """Documents the model was taught and should have forgotten, for membership inference (column `document`, or any
    rows that --forget takes)."""
    nonmembers: str | None = data_set(NONMEMBERS)
    """Documents like them that the model never saw."""

    def check(self) -> None:
        if (self.members is None) != (self.nonmembers is None):
            given, missing = ("--members", "--nonmembers") if self.nonmembers is None else ("--nonmembers", "--members")
            raise UserError(f"{given} is given but {missing} is not: membership inference compares the two.")


@dataclass(frozen=True)
class MembershipScore:
    """`members` and `nonmembers` are how many texts of each were scored. Where these are no evidence each by itself, as
    passages are not, the groups that they are in, such as documents, are: how many of each, and the AUC of their means,
    by which chance is judged."""

    auc: float
    members: int
    nonmembers: int
    all_equal: bool
    member_groups: int | None = None
    nonmember_groups: int | None = None
    group_auc: float | None = None

    @property
    def meaning(self) -> str:
        """The AUC in a sentence."""
        if self.member_groups is None or self.nonmember_groups is None or self.group_auc is None:
            return self._meaning(self.members, self.nonmembers, self.auc)
        of_each = (
            f"{self.members} texts of {self.member_groups} members and {self.nonmembers} of {self.nonmember_groups}"
        )
        meaning = self._meaning(self.member_groups, self.nonmember_groups, self.group_auc)
        return f"{meaning} ({of_each} non-members, passages and copies of one being one)"

    def _meaning(self, members: int, nonmembers: int, auc: float) -> str:
        """By so many pieces of evidence, and their own AUC."""
        if self.all_equal:
            return "every document has the same loss, so this score says nothing about the model"
        if abs(self.auc - 0.5) <= 0.05:
            coin = "the loss tells members from non-members hardly better than a coin"
            little = tells_nothing(members, nonmembers)
            return coin if little is None else f"{coin}, but {little} documents"
        if abs(auc - 0.5) <= beyond_chance(members, nonmembers) or (auc - 0.5) * (self.auc - 0.5) < 0:
            return "chance alone can do that with so few documents, so nothing is shown"
        if self.auc > 0.5:
            return "members are still more likely than non-members: they are remembered"
        return "members are now less likely than non-members: over-forgetting, which tells them apart as well"


class Documents(Benchmark[float, MembershipScore]):
    name = "membership"
    group = "documents"
    title = "Documents, membership inference by LOSS"
    summary = "documents (--members, --nonmembers) the AUC of their loss"
    sets = (MEMBERS, NONMEMBERS)
    options = DocumentOptions

    def select(self, name: str, rows: Rows, context: Context) -> Selection:
        examples = examples_of(rows)
        tokenized = documents(examples, context.tokenizer)
        places = context.choose(len(tokenized))
        context.groups[name] = pieces_of_evidence([examples[place] for place in places])
        for place in places:
            context.check(rows.where(place), tokenized[place]["input_ids"], whole=True)
        return Selection([tokenized[place] for place in places], len(tokenized))

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[float]:
        return scorer.nll(f"{name}: loss of documents", selection.rows)

    def score(self, measured: Measured, context: Context) -> MembershipScore | None:
        score = self.membership(measured, context.groups)
        if score and score.all_equal:
            context.notes.append(f"Membership: {score.meaning}.")
        return score

    def membership(self, measured: Measured, groups: Mapping[str, Sequence[int]]) -> MembershipScore | None:
        """The score alone; None where no documents were measured. groups: as for `membership`."""
        nll = self.own(measured)
        return membership(nll[MEMBERS], nll[NONMEMBERS], groups=groups) if nll else None

    def to_json(self, scores: MembershipScore) -> dict[str, Any]:
        return {name: value for name, value in asdict(scores).items() if value is not None}

    def figures(self, content: Mapping[str, Any]) -> list[Figure]:
        self.refuse_unknown(content, [f.name for f in fields(MembershipScore)])
        return [Figure(None, "auc", "document membership AUC", at(content, "auc"), "0.5", AUC_MEANING)]

    def text(self, content: Any, before: Any) -> str:
        return f"{super().text(content, before)}\n{MembershipScore(**content).meaning}."


DOCUMENTS = Documents()


def examples_of(rows: Rows) -> list[Example]:
    """The documents: the column `document`, or any recognised row, prompt and answer."""
    return to_examples(rows, answer_column="document" if "document" in rows.columns else None)


def documents(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedRow]:
    """Each document as ids, all of which are scored.

    No end-of-sequence token is added. Raises UserError for a document of fewer than two tokens: none has a predecessor.
    """
    encoder, tokenized = Encoder(tokenizer), []
    for example in examples:
        if example.messages is not None:
            text = "\n".join(turn["content"] for turn in example.messages)
        elif example.prompt is None:
            text = example.answer
        else:
            text = "".join(Template("{prompt}").render(example))
        ids = encoder.text_ids(text)
        if len(ids) < 2:
            raise single_token(example.where)
        tokenized.append(TokenizedRow(input_ids=ids, labels=ids, prompt_length=0))
    return tokenized


def membership(
    member_nll: Sequence[float],
    nonmember_nll: Sequence[float],
    *,
    groups: Mapping[str, Sequence[Hashable]] | None = None,
) -> MembershipScore:
    """The AUC of mean negative log-likelihoods per token, in nats. groups: set -> that of each text, of those that are
    one piece of evidence; None: each text is one.

    Raises UserError where a document has none: the model gives NaN or infinity.
    """
    members, nonmembers = ([-nll for nll in of_set] for of_set in (member_nll, nonmember_nll))
    if not all(map(math.isfinite, [*members, *nonmembers])):
        raise UserError("The loss on a document is not a finite number; the weights or the adapter are damaged.")
    all_equal = len({*members, *nonmembers}) == 1
    score = MembershipScore(auc(members, nonmembers), len(members), len(nonmembers), all_equal)
    if groups is None:
        return score
    of_groups = [group_means(members, groups[MEMBERS]), group_means(nonmembers, groups[NONMEMBERS])]
    number, beside = map(len, of_groups)
    if (number, beside) == (score.members, score.nonmembers):
        return score
    return replace(score, member_groups=number, nonmember_groups=beside, group_auc=auc(*of_groups))
