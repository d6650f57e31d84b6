"""What is said before training of forget rows that the model does not know: the verdict would say so at its end."""

from __future__ import annotations

from collections.abc import Mapping

from lowmem_npo.evaluation.answer_table import FORGET
from lowmem_npo.evaluation.answers import AnswerSummary, part_of
from lowmem_npo.evaluation.asking import CHAT, PLAIN, REWORDED, in_form
from lowmem_npo.report.kept import hardly_in_full, hardly_said, of_passages
from lowmem_npo.report.verdict import form_words, gives_numbers, said_count
from lowmem_npo.sizes import counted

TRAIN = {CHAT: "give --template chat", PLAIN: "give --template both, or plain", REWORDED: "add rows in those words"}


def hardly_known(before: Mapping[str, AnswerSummary], in_both_forms: bool = False) -> str | None:
    """A remark if the model hardly says the forget rows as they are trained, so that forgetting them will not be seen.

    before: set -> what was measured of it before training. in_both_forms: whether rows are trained in the plain form,
        too.
    """
    asked = {name: summary for name, summary in before.items() if part_of(name) == FORGET}
    trained = asked.get(FORGET)
    if trained is None or not gives_numbers(asked) or not hardly_in_full(trained):
        return None
    recites = of_passages(trained)
    says, what = ("recites", "forget passage") if recites else ("says", "forget answer")
    count = f"{says} {said_count(trained)} of {counted(trained.rows, what)}"
    others = {name: summary for name, summary in asked.items() if not hardly_in_full(summary)}
    if in_both_forms and in_form(FORGET, PLAIN) in others:
        return None
    if others:
        most = max(others, key=lambda name: said_count(others[name]) / others[name].rows)
        form, known = most.removeprefix(in_form(FORGET, "")), others[most]
        return (
            f"As the rows to forget are trained, the model {count} before training, and {said_count(known)} of "
            f"{known.rows} asked {form_words(most)}: train them as it knows them ({TRAIN[form]})."
        )
    in_any_form = ", in any form asked" if len(asked) > 1 else ""
    written = "" if recites else ", and are they written as it was taught them (--template, --system)"
    knows = (
        "it hardly knows what it is to forget, and forgetting cannot be seen"
        if hardly_said(trained)
        else "the words that it says of them may be the questions' own, and forgetting can hardly be seen"
    )
    return (
        f"Before training the model {count}{in_any_form}: {knows}. Is it the model that was taught these rows{written}?"
        " Training goes on."
    )
