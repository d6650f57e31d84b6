"""Whether the loss of a document still tells that the model was taught it: membership inference by LOSS.

Every document gets the score -(mean negative log-likelihood of its tokens, the first excepted). The AUC is the
probability that a member scores above a non-member: 0.5 tells nothing, towards 1 the members are still known, towards 0
they are now suspiciously unlikely, which gives them away as well.

Yeom et al. 2018, https://arxiv.org/abs/1709.01604; as in the evaluation of SemEval-2025 Task 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from lowmem_npo.data import Encoder, Rows, Template, TokenizedRow, to_examples
from lowmem_npo.data.tokenizing import single_token
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.benchmarks.contract import Benchmark, Context, Measured, Selection
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
    """`members` and `nonmembers` are how many documents of each were scored."""

    auc: float
    members: int
    nonmembers: int
    all_equal: bool

    @property
    def meaning(self) -> str:
        """The AUC in a sentence."""
        if self.all_equal:
            return "every document has the same loss, so this score says nothing about the model"
        if abs(self.auc - 0.5) <= 0.05:
            coin = "the loss tells members from non-members hardly better than a coin"
            little = tells_nothing(self.members, self.nonmembers)
            return coin if little is None else f"{coin}, but {little} documents"
        if abs(self.auc - 0.5) <= beyond_chance(self.members, self.nonmembers):
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
        tokenized = documents(rows, context.tokenizer)
        places = context.choose(len(tokenized))
        for place in places:
            context.check(rows.where(place), tokenized[place]["input_ids"], whole=True)
        return Selection([tokenized[place] for place in places], len(tokenized))

    def measure(self, name: str, selection: Selection, scorer: Scorer, context: Context) -> list[float]:
        return scorer.nll(f"{name}: loss of documents", selection.rows)

    def score(self, measured: Measured, context: Context) -> MembershipScore | None:
        score = self.membership(measured)
        if score and score.all_equal:
            context.notes.append(f"Membership: {score.meaning}.")
        return score

    def membership(self, measured: Measured) -> MembershipScore | None:
        """The score alone; None where no documents were measured."""
        nll = self.own(measured)
        return membership(nll[MEMBERS], nll[NONMEMBERS]) if nll else None

    def to_json(self, scores: MembershipScore) -> dict[str, Any]:
        return asdict(scores)

    def figures(self, content: Mapping[str, Any]) -> list[Figure]:
        self.refuse_unknown(content, [f.name for f in fields(MembershipScore)])
        return [Figure(None, "auc", "document membership AUC", at(content, "auc"), "0.5", AUC_MEANING)]

    def text(self, content: Any, before: Any) -> str:
        return f"{super().text(content, before)}\n{MembershipScore(**content).meaning}."


DOCUMENTS = Documents()


def documents(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedRow]:
    """Each document as ids, all of which are scored: the column `document`, or any recognised row, prompt and answer.

    No end-of-sequence token is added. Raises UserError for a document of fewer than two tokens: none has a predecessor.
    """
    column = "document" if "document" in rows.columns else None
    examples = to_examples(rows, answer_column=column)
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


def membership(member_nll: Sequence[float], nonmember_nll: Sequence[float]) -> MembershipScore:
    """The AUC of mean negative log-likelihoods per token, in nats.

    Raises UserError where a document has none: the model gives NaN or infinity.
    """
    members, nonmembers = ([-nll for nll in of_set] for of_set in (member_nll, nonmember_nll))
    if not all(map(math.isfinite, [*members, *nonmembers])):
        raise UserError("The loss on a document is not a finite number; the weights or the adapter are damaged.")
    all_equal = len({*members, *nonmembers}) == 1
    return MembershipScore(auc(members, nonmembers), len(members), len(nonmembers), all_equal)
