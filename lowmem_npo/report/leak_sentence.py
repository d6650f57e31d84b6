"""What leak tests found, in a sentence of the report."""

from __future__ import annotations

from lowmem_npo.evaluation.leaks.contract import LeakResults


def leaking_tests(results: LeakResults) -> list[str]:
    """The tests that found traces, or, without a holdout, that much is left."""
    return [name for name, result in results.items() if result.leaks is True]


def leak_sentence(results: LeakResults, gold: LeakResults | None, has_attack: bool) -> str:
    """results: of the model; gold: of one that never saw the rows, where there is one. has_attack: whether a sentence
    on the worst attack follows."""
    against_holdout = {name: r for name, r in results.items() if r.leaks is not None and not r.against_before}
    against_before = {name: r for name, r in results.items() if r.leaks is not None and r.against_before}
    undecided = [name for name, r in results.items() if r.leaks is None and r.figures]
    if not against_holdout and not against_before:
        unknown = "what can still be extracted is not known"
        if not undecided:
            return f"No leak test was run: {unknown}."
        none = f"None of the {len(undecided)} leak tests that were run was conclusive ({', '.join(undecided)})"
        only = f"The one leak test that was run, {undecided[0]}, was not conclusive"
        beyond = ", but for what the worst attack brought back" if has_attack else ""
        return f"{only if len(undecided) == 1 else none}: {unknown}{beyond}."
    sentences = []
    if against_holdout:
        if found := leaking_tests(against_holdout):
            count = f"{len(found)} of {len(against_holdout)}"
            sentences.append(f"Traces in {count} conclusive leak tests: {', '.join(found)}.")
        else:
            sentences.append(f"No traces in any conclusive leak test: {', '.join(against_holdout)}.")
        if found and gold is not None:
            on_gold = ", ".join(leaking_tests(gold)) or "none"
            sentences.append(f"In a model that never saw the rows: {on_gold}.")
    if against_before:
        left = leaking_tests(against_before)
        less = [name for name in against_before if name not in left]
        said = [*([f"much is left by {', '.join(left)}"] if left else []),
                *([f"much less by {', '.join(less)}"] if less else [])]  # fmt: skip
        sentences.append(
            f"Compared with the model before, {'; '.join(said)}; without a holdout it is not known whether that is "
            "more than a model gives that never saw the rows."
        )
    if undecided:
        sentences.append(f"Could not tell: {', '.join(undecided)}.")
    return " ".join(sentences)
