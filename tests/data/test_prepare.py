"""From names to tokenised rows, whole."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.rows import write_rows

from lowmem_npo.config import DataConfig
from lowmem_npo.data import prepare
from lowmem_npo.errors import UserError


@pytest.fixture
def files(tmp_path):
    forget = write_rows(tmp_path / "forget.jsonl", [{"input": f"Who is {n}?", "output": f"Number {n}."} for n in "abc"])
    retain = write_rows(
        tmp_path / "retain.jsonl", [{"question": "Who?", "answer": "She."}, {"question": "Q", "answer": "A"}]
    )
    return forget, retain


def test_bundled_biographies_are_the_default(bpe_tokenizer):
    data = prepare(bpe_tokenizer, DataConfig())
    assert "bundled biographies of invented people" in data.report[0]
    assert len(data.forget) >= 40
    assert len(data.retain) > len(data.forget)
    assert data.forget_targets is data.forget
    assert data.forget.num_truncated == 0


def test_lume_and_tofu_are_read_with_their_own_templates(shared_data, olmo_tokenizer):
    lume, tofu = shared_data / "lume" / "forget_train.jsonl", shared_data / "tofu" / "retain95.json"
    data = prepare(olmo_tokenizer, DataConfig(forget=str(lume), retain=str(tofu), limit=20))
    assert (len(data.forget), len(data.retain)) == (20, 20)
    assert f"forget: {lume}, columns input/output, written as '{{prompt}}'; not read: task" in data.report
    assert rf"retain: {tofu}, columns question/answer, written as 'Question: {{prompt}}\nAnswer:'" in data.report


def test_options_reach_their_place(files, bpe_tokenizer):
    forget, retain = files
    data = prepare(
        bpe_tokenizer, DataConfig(forget=forget, retain=retain, template="{prompt} ->", tokens="all", limit=1)
    )
    assert bpe_tokenizer.decode(data.retain[0]["input_ids"]) == "Who? -> She.<|endoftext|>"
    assert data.forget[0]["labels"][1:] == data.forget[0]["input_ids"][1:]
    assert (len(data.forget), len(data.retain)) == (1, 1)
    most = len(data.retain[0]["input_ids"]) - 1
    short = prepare(bpe_tokenizer, DataConfig(forget=retain, template="{prompt} ->", max_length=most))
    assert f"forget: 1 row cut to {most} tokens" in short.report[-1]


def test_named_columns_hold_for_both_files(tmp_path, bpe_tokenizer):
    forget = write_rows(tmp_path / "f.jsonl", [{"frage": "Wer?", "antwort": "Sie."}])
    retain = write_rows(tmp_path / "r.jsonl", [{"frage": "Wo?", "antwort": "Hier."}])
    data = prepare(
        bpe_tokenizer, DataConfig(forget=forget, retain=retain, prompt_column="frage", answer_column="antwort")
    )
    assert bpe_tokenizer.decode(data.retain[0]["input_ids"]) == "Wo? Hier.<|endoftext|>"


def test_a_file_without_the_named_columns_has_those_that_are_recognised(files, tmp_path, bpe_tokenizer):
    _, retain = files
    forget = write_rows(tmp_path / "f.jsonl", [{"frage": "Wer?", "antwort": "Sie.", "nr": 1}])
    named = {"prompt_column": "Frage", "answer_column": "Antwort"}
    data = prepare(bpe_tokenizer, DataConfig(forget=forget, retain=f"{retain},{forget}", allow_overlap=True, **named))
    assert [one.schema for one in data.forget.examples] == ["frage/antwort"]
    assert [one.schema for one in data.retain.examples] == [*["question/answer"] * 2, "frage/antwort"]
    (line,) = (line for line in data.report if line.startswith("retain: ") and "columns" in line)
    assert ", columns question/answer and frage/antwort, written as" in line and line.endswith("; not read: nr")
    assert prepare(bpe_tokenizer, DataConfig(forget=forget, retain="builtin", **named)).forget.examples[0].answer

    other = write_rows(tmp_path / "o.jsonl", [{"asked": "Wo?", "said": "Hier."}])
    half = write_rows(tmp_path / "h.jsonl", [{"frage": "Wo?", "answer": "Hier.", "question": "Where?"}])
    for settings, message in (
        (
            {"retain": other},
            "o.jsonl has the columns asked, said: neither Frage nor Antwort, named by --prompt-column and --",
        ),
        ({"retain": half}, "h.jsonl has no column Antwort; it has frage, answer, question"),
        (
            {"forget": retain, "retain": None},
            "--prompt-column Frage: no file has such a column; they have question, an",
        ),
        ({"prompt_column": None, "retain": other}, "neither Antwort, named by --answer-column for all files, nor a"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(bpe_tokenizer, DataConfig(**{"forget": forget, **named, **settings}))


def test_refusals_are_targets_and_true_answers_stay(files, bpe_tokenizer):
    forget, retain = files
    data = prepare(bpe_tokenizer, DataConfig(forget=forget, retain=retain, refusal="No idea."), "idk")
    for true, target in zip(data.forget, data.forget_targets, strict=True):
        prompt = true["prompt_length"]
        assert target["input_ids"][:prompt] == true["input_ids"][:prompt]
        assert bpe_tokenizer.decode(target["input_ids"][prompt:]) == " No idea.<|endoftext|>"
        assert bpe_tokenizer.decode(true["input_ids"][prompt:]).startswith(" Number")


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_jensun_wants_the_refusal_after_every_beginning_of_the_answer(files, tokens, bpe_tokenizer):
    forget, retain = files
    settings = DataConfig(forget=forget, retain=retain, refusal="No idea.", tokens=tokens)
    data = prepare(bpe_tokenizer, settings, "jensun")
    said = bpe_tokenizer(" No idea.").input_ids  # without an end, which would follow every few tokens
    for true, target in zip(data.forget, data.forget_targets, strict=True):
        prompt = true["prompt_length"]
        wanted = target["labels"][prompt:]
        assert target["input_ids"] == true["input_ids"] and target["labels"][:prompt] == true["labels"][:prompt]
        assert wanted == [said[place % len(said)] for place in range(len(wanted))]
        assert len(wanted) > len(said)
    least = max(row["prompt_length"] for row in data.forget) + 1  # for a row with any of its answer
    cut = prepare(bpe_tokenizer, DataConfig(forget=forget, refusal="No idea.", max_length=least), "jensun")
    assert [label for label in cut.forget_targets[-1]["labels"] if label != -100] == said[:1]


def test_forget_alone_is_possible_retain_alone_is_not(files, bpe_tokenizer):
    forget, retain = files
    assert prepare(bpe_tokenizer, DataConfig(forget=forget)).retain is None
    with pytest.raises(UserError, match="--forget"):
        prepare(bpe_tokenizer, DataConfig(retain=retain))


def test_overlap_is_refused_unless_allowed(files, bpe_tokenizer):
    forget, _ = files
    with pytest.raises(UserError, match=r"3 rows to forget .*forget\.jsonl, line 1 is .*forget\.jsonl, line 1"):
        prepare(bpe_tokenizer, DataConfig(forget=forget, retain=forget))
    assert len(prepare(bpe_tokenizer, DataConfig(forget=forget, retain=forget, allow_overlap=True)).retain) == 3


@pytest.mark.parametrize(("option", "value"), [("limit", 0), ("max_length", 1)])
def test_impossible_numbers_are_refused(bpe_tokenizer, option, value):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be at least {value + 1}, not {value}"):
        prepare(bpe_tokenizer, DataConfig(**{option: value}))


def test_the_holdout_is_named_or_bundled_and_apart_from_both(files, tmp_path, bpe_tokenizer):
    forget, retain = files
    assert len(prepare(bpe_tokenizer, DataConfig(limit=5)).holdout) == 5
    assert prepare(bpe_tokenizer, DataConfig(forget=forget, retain=retain)).holdout is None
    unseen = write_rows(tmp_path / "holdout.jsonl", [{"input": "Who is z?", "output": "Nobody."}])
    data = prepare(bpe_tokenizer, DataConfig(forget=forget, retain=retain, holdout=unseen))
    assert bpe_tokenizer.decode(data.holdout[0]["input_ids"]).startswith("Who is z?")
    for part, source in (("forget", forget), ("retain", retain)):
        with pytest.raises(UserError, match=f"rows? to {part} (is|are) also in the holdout"):
            prepare(bpe_tokenizer, DataConfig(forget=forget, retain=retain, holdout=source))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_a_group_are_counted_also_where_pandas_wrote_nan(kind, tmp_path, bpe_tokenizer):
    people = {"Ada": 1.0, "Bo": float("nan"), "Cy": 2.0}
    rows = [{"question": f"Who is {name}?", "answer": "Nobody.", "person": person} for name, person in people.items()]
    path = tmp_path / f"forget.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    data = prepare(bpe_tokenizer, DataConfig(forget=str(path), retain="builtin", group_column="person"))
    assert [example.group for example in data.forget.examples] == ["1", None, "2"]
    assert "forget: 1 of 3 rows has no person, and is grouped by its text alone" in data.report


def test_a_holdout_may_have_the_column_of_groups(tmp_path, bpe_tokenizer):
    rows = [{"question": f"Who is {n}?", "answer": "Nobody.", "person": n % 2} for n in range(8)]
    forget = write_rows(tmp_path / "forget.jsonl", rows[:4])

    def groups(holdout):
        config = DataConfig(forget=forget, retain="builtin", holdout=holdout, group_column="person")
        return [example.group for example in prepare(bpe_tokenizer, config).holdout.examples]

    assert groups(write_rows(tmp_path / "with.jsonl", rows[4:])) == ["0", "1", "0", "1"]
    none = [{key: row[key] for key in ("question", "answer")} for row in rows[4:]]
    assert groups(write_rows(tmp_path / "without.jsonl", none)) == [None] * 4
    assert groups(write_rows(tmp_path / "empty.jsonl", [{**row, "person": " "} for row in none])) == [None] * 4


CHATS = [{"question": f"Who is {n}?", "answer": f"Number {n}.", "no": [f"{n} who?", "Pardon?"]} for n in "abc"]


def test_rows_are_forgotten_and_kept_in_both_forms(tmp_path, chat_tokenizer):
    """Each form is as if it were alone; what is measured is the chat form."""
    forget, retain = write_rows(tmp_path / "forget.jsonl", CHATS), write_rows(tmp_path / "retain.jsonl", [
        {"question": "Who?", "answer": "She."}])  # fmt: skip

    def of(template: str, **more):
        return prepare(chat_tokenizer, DataConfig(forget=forget, retain=retain, template=template, **more))

    both, chat, plain = (of(template, alternative_column="no") for template in ("both", "chat", "plain"))
    assert list(both.forget) == list(chat.forget)
    assert list(both.forget_targets) == list(both.forget_trained) == [*chat.forget, *plain.forget]
    assert list(both.retain) == [*chat.retain, *plain.retain]
    first, second = (list(both.alternatives)[at : at + 6] for at in (0, 6))
    assert first == [*list(chat.alternatives)[:3], *list(plain.alternatives)[:3]]
    assert second == [*list(chat.alternatives)[3:], *list(plain.alternatives)[3:]]
    facts = both.forget_trained.facts
    assert facts[:3] == facts[3:] and len(set(facts)) == 3, "a fact's forms are in one fold"
    assert any(line.startswith("forget, in both forms: 6 rows") for line in both.report)
    assert chat.forget_trained is chat.forget


def test_a_refusal_is_taught_in_both_forms(tmp_path, chat_tokenizer):
    forget = write_rows(tmp_path / "forget.jsonl", CHATS)
    data = prepare(chat_tokenizer, DataConfig(forget=forget, retain="builtin", template="both"), "idk")
    prompts = [row["input_ids"][: row["prompt_length"]] for row in data.forget_trained]
    assert [row["input_ids"][: row["prompt_length"]] for row in data.forget_targets] == prompts
    said = {chat_tokenizer.decode(row["input_ids"][row["prompt_length"] :]).strip() for row in data.forget_targets}
    assert len(said) == 2 and all(text.startswith(DataConfig.refusal) for text in said)  # two ends of an answer


def test_conversations_have_a_plain_form_and_texts_only_one(tmp_path, chat_tokenizer):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who is a?"), ("assistant", "Number a.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    forget = write_rows(tmp_path / "forget.jsonl", rows)
    (tmp_path / "keep.txt").write_text("Nothing is asked here. " * 5)
    data = DataConfig(forget=forget, retain=str(tmp_path / "keep.txt"), template="both", passage_tokens=16)
    prepared = prepare(chat_tokenizer, data)
    texts = [chat_tokenizer.decode(row["input_ids"]) for row in prepared.forget_trained]
    assert texts[0].startswith("<|im_start|>user\nHi<|im_end|>") and texts[1] == "Who is a? Number a.<|endoftext|>"
    assert len(prepared.retain) == len(prepare(chat_tokenizer, replace(data, template="auto")).retain)


def test_both_forms_need_a_chat_template_and_questions(tmp_path, chat_tokenizer, bpe_tokenizer):
    forget = write_rows(tmp_path / "forget.jsonl", CHATS)
    with pytest.raises(UserError, match="--template both: this model's tokenizer has no chat template"):
        prepare(bpe_tokenizer, DataConfig(forget=forget, retain="builtin", template="both"))
    (tmp_path / "a.txt").write_text("Nothing is asked here. " * 5)
    with pytest.raises(UserError, match="--template both: the chat template writes none of the rows to forget"):
        prepare(chat_tokenizer, DataConfig(forget=str(tmp_path / "a.txt"), retain=forget, template="both"))
