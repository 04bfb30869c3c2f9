"""Faults that strangers met in chats, tokenizers and long rows, each with what is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spectune.data import Encoded, encode, load_rows, prompt_ids
from spectune.errors import DataError
from tests.support.chat_templates import tokenizer_for
from tests.support.marking import marked, stretches
from tests.support.tokenizers_zoo import byte_level, comparable, metaspace, raw_text, wordpiece

ONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TWO = [*ONE, {"role": "user", "content": "ho"}, {"role": "assistant", "content": "no"}]
IM_HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "York"}}}
SENTENCE_PIECES = [
    pytest.param({"prepend": prepend, "model": model, "puts_bos": bos}, id=f"{prepend}-{model}-{bos}")
    for prepend in ("always", "first")
    for model in ("bpe", "unigram")
    for bos in (False, True)
]


def encoded(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Encoded:
    return encode(load_rows([record]), tokenizer, **{"max_length": 4096, **settings})


def learned(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **settings: Any) -> str:
    [example] = encoded(record, tokenizer, **settings).examples
    return marked(example, tokenizer)


def chat(answer: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [ONE[0], {"role": "assistant", "content": answer}], **columns}


# -- 1: the rendered text is cut where the prompt ends ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answer", "right"),
    [
        (
            "qwq",
            "<think>\nthe reason\n</think>\nyes",
            IM_HI + "<think>\n[[the reason\n</think>\nyes<|im_end|>]]",
        ),
        ("empty_thought", "yes", IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]"),
        (
            "prompt_ends_in_space",
            "yes",
            "user: hi<|im_end|>\nassistant: [[yes<|im_end|>\n<|endoftext|>]]",
        ),
    ],
)
def test_a_chat_s_target_is_the_rest_of_the_rendered_text(template: str, answer: str, right: str) -> None:
    assert learned(chat(answer), tokenizer_for(template, "byte_level")) == right


def test_tokens_do_merge_at_the_seams_of_these_tests() -> None:
    """Else they would find nothing: the whole's tokens lie across the prompt's end."""
    tokenizer = byte_level()
    for prompt, rest in (("<think>\n", "\n</think>"), ("assistant: ", "yes"), ("\n", "\n")):
        apart, together = (
            tokenizer(prompt)["input_ids"] + tokenizer(rest)["input_ids"],
            tokenizer(prompt + rest)["input_ids"],
        )
        assert apart != together
        assert together[: len(tokenizer(prompt)["input_ids"])] != tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("skip", [False, True])
def test_a_rendering_that_does_not_begin_with_its_prompt_is_refused_by_line(tmp_path: Path, skip: bool) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat(text)) + "\n" for text in ("<think>\nno\n</think>\nyes", "yes")))
    tokenizer = tokenizer_for("qwq", "byte_level")
    if not skip:
        with pytest.raises(DataError, match=r"chats\.jsonl:2"):
            encode(load_rows(path), tokenizer, max_length=4096)
        return
    found = encode(load_rows(path, skip_bad_rows=True), tokenizer, max_length=4096)
    report = found.report.to_dict()
    assert (report["rows"], report["kept"], report["bad"]) == (2, 1, 1)
    assert f"{path}:2" in report["bad_rows"][0]
    assert [example.row.origin for example in found.examples] == [f"{path}:1"]


# -- 2: all turns ----------------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_learned_or_the_last_alone() -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    both = IM_HI + "[[yes<|im_end|>]]\n<|im_start|>user\nho<|im_end|>\n<|im_start|>assistant\n[[no<|im_end|>]]"
    assert learned({"messages": TWO}, tokenizer) == both
    assert learned({"messages": TWO}, tokenizer, train_on="all") == both
    last = both.replace("[[yes<|im_end|>]]", "yes<|im_end|>")
    assert learned({"messages": TWO}, tokenizer, train_on="last") == last
    for switch in ({"weight": 0}, {"train": False}):
        messages = [TWO[0], {**TWO[1], **switch}, *TWO[2:]]
        assert learned({"messages": messages}, tokenizer) == last
        with pytest.raises(DataError, match="row 1"):
            encoded(chat("yes") | {"messages": [TWO[0], {**TWO[1], **switch}]}, tokenizer)


def test_the_targets_of_all_turns_are_counted() -> None:
    tokenizer = tokenizer_for("chatml", "byte_level")
    found = encoded({"messages": TWO}, tokenizer)
    inside = sum(len(ids) for is_learned, ids in stretches(found.examples[0]) if is_learned)
    assert found.examples[0].target_tokens == inside == found.report.to_dict()["target_tokens"]
    assert found.sha256 != encoded({"messages": TWO}, tokenizer, train_on="last").sha256


# -- 3: the other columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_reach_the_template(tools: Any) -> None:
    said = learned(chat("yes", tools=tools), tokenizer_for("hermes", "byte_level"))
    assert said == f"<|im_start|>system\n# Tools\n<tools>\n{json.dumps(TOOL)}\n</tools><|im_end|>\n" + IM_HI + (
        "[[yes<|im_end|>]]"
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_documents_reach_the_template(as_text: bool) -> None:
    documents = [{"title": "York", "text": "a town"}]
    given = json.dumps(documents) if as_text else documents
    said = learned(chat("yes", documents=given), tokenizer_for("command_r", "byte_level"))
    assert "<results>\nDocument: 0\nYork\na town\n</results>" in said
    assert said.endswith("<|CHATBOT_TOKEN|>[[yes<|END_OF_TURN_TOKEN|>]]")


def test_arguments_of_the_row_reach_the_template() -> None:
    row = chat("yes", chat_template_kwargs={"enable_thinking": False})
    tokenizer = tokenizer_for("qwen3", "byte_level")
    assert learned(row, tokenizer) == IM_HI + "<think>\n\n</think>\n\n[[yes<|im_end|>]]"
    assert raw_text(tokenizer, prompt_ids(load_rows([row])[0], tokenizer)) == IM_HI + "<think>\n\n</think>\n\n"


def test_a_system_column_beside_conversations_is_the_system_message() -> None:
    row = {"system": "he said", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    said = learned(row, tokenizer_for("chatml", "byte_level"))
    assert said == "<|im_start|>system\nhe said<|im_end|>\n" + IM_HI + "[[yes<|im_end|>]]"


def test_the_system_and_history_columns_of_alpaca_rows_are_in_the_prompt() -> None:
    row = {"instruction": "Say it.", "input": "", "output": "yes", "system": "he said"}
    tokenizer = byte_level()
    said = learned(row, tokenizer)
    assert said == "he said\n\n### Instruction:\nSay it.\n\n### Response:\n[[yes</s>]]"
    said = learned({**row, "history": [["the first question", "the first answer"]]}, tokenizer)
    plain = said.replace("[[", "").replace("]]", "")
    order = [plain.index(text) for text in ("he said", "the first question", "the first answer", "Say it.")]
    assert order == sorted(order)
    assert said.endswith("### Instruction:\nSay it.\n\n### Response:\n[[yes</s>]]")


# -- 4: roles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["human", "User", "USER"])
@pytest.mark.parametrize("answers", ["gpt", "bot", "model", "chatbot"])
def test_other_names_of_user_and_assistant_are_known(role: str, answers: str) -> None:
    row = {"messages": [{"role": role, "content": "hi"}, {"role": answers, "content": "yes"}]}
    assert learned(row, tokenizer_for("skips_unknown_roles", "byte_level")) == IM_HI + "[[yes<|im_end|>]]"


@pytest.mark.parametrize("role", ["tool", "developer", "ipython", "critic"])
def test_a_message_that_the_template_leaves_away_refuses_the_row(role: str) -> None:
    row = {"messages": [ONE[0], {"role": role, "content": "10:15"}, ONE[1]]}
    with pytest.raises(DataError, match="row 1") as caught:
        encoded(row, tokenizer_for("skips_unknown_roles", "byte_level"))
    assert role in str(caught.value)


# -- 5: tool calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_tool_call_without_words_is_learned(content: dict[str, Any], as_text: bool) -> None:
    function: dict[str, Any] = dict(CALL["function"])  # type: ignore[arg-type]
    if as_text:
        function["arguments"] = json.dumps(function["arguments"])
    row = {"messages": [ONE[0], {"role": "assistant", **content, "tool_calls": [{**CALL, "function": function}]}]}
    said = learned(row, tokenizer_for("hermes", "byte_level"))
    assert said == IM_HI + (
        '[[<tool_call>\n{"name": "get_time", "arguments": {"city": "York"}}\n</tool_call><|im_end|>]]'
    )


def test_sharegpt_s_calls_and_observations_are_tool_calls_and_results() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "get_time", "arguments": {"city": "York"}}'},
            {"from": "observation", "value": "10:15"},
            {"from": "gpt", "value": "ten"},
        ]
    }
    assert learned(row, tokenizer_for("hermes", "byte_level")) == IM_HI + (
        '[[<tool_call>\n{"name": "get_time", "arguments": {"city": "York"}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\n10:15\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "[[ten<|im_end|>]]"
    )


# -- 6: generation prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no_prompt", "always_prompt"])
def test_a_turn_s_header_is_not_learned_whether_or_not_the_template_asks(name: str) -> None:
    tokenizer = tokenizer_for(name, "byte_level")
    assert learned({"messages": ONE}, tokenizer) == IM_HI + "[[yes<|im_end|>]]"
    [row] = load_rows([{"messages": ONE}])
    assert raw_text(tokenizer, prompt_ids(row, tokenizer)) == IM_HI


# -- 7: a template's refusal -----------------------------------------------------------------------------------------


def test_a_row_that_the_template_refuses_is_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [chat("yes"), chat("no"), {"messages": [{"role": "system", "content": "he said"}, *ONE]}, chat("ten")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_for("gemma", "byte_level")
    with pytest.raises(DataError, match="System role not supported") as caught:
        encode(load_rows(path), tokenizer, max_length=4096)
    assert f"{path}:3" in str(caught.value)
    assert all(f"{path}:{line}" not in str(caught.value) for line in (1, 2, 4))
    found = encode(load_rows(path, skip_bad_rows=True), tokenizer, max_length=4096)
    report = found.report.to_dict()
    assert (report["rows"], report["kept"], report["bad"], len(found.examples)) == (4, 3, 1, 3)
    assert f"{path}:3" in report["bad_rows"][0]


def test_all_rows_that_the_template_refuses_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    system = {"messages": [{"role": "system", "content": "he said"}, *ONE]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (system, chat("yes"), system)))
    with pytest.raises(DataError) as caught:
        encode(load_rows(path), tokenizer_for("gemma", "byte_level"), max_length=4096)
    assert f"{path}:1" in str(caught.value)
    assert f"{path}:3" in str(caught.value)


# -- 8: dates --------------------------------------------------------------------------------------------------------


def test_a_template_s_date_is_the_one_that_is_given() -> None:
    tokenizer = tokenizer_for("llama31", "byte_level")
    first = encoded({"messages": ONE}, tokenizer, today="2026-02-03")
    assert "Today Date: 03 Feb 2026\n" in marked(first.examples[0], tokenizer)
    assert first.sha256 == encoded({"messages": ONE}, tokenizer, today="2026-02-03").sha256
    other = encoded({"messages": ONE}, tokenizer, today="1999-12-31")
    assert "Today Date: 31 Dec 1999\n" in marked(other.examples[0], tokenizer)
    [row] = load_rows([{"messages": ONE}])
    ids = prompt_ids(row, tokenizer, today="1999-12-31")
    assert ids == other.examples[0].input_ids[: len(ids)]


# -- 10: ids outside the embedding -----------------------------------------------------------------------------------


def test_a_row_with_ids_outside_the_embedding_is_refused_by_name() -> None:
    tokenizer = byte_level(added=("<river>",))
    table = len(tokenizer) - 1
    inside, outside = {"prompt": "hi", "completion": "yes"}, {"prompt": "hi", "completion": "<river>"}
    assert encode(load_rows([inside]), tokenizer, max_length=60, vocab_size=table).examples
    for record in (outside, {"prompt": "<river>", "completion": "yes"}, {"text": "hi <river> yes"}):
        with pytest.raises(DataError, match="row 2") as caught:
            encode(load_rows([inside, record]), tokenizer, max_length=60, vocab_size=table)
        assert "resize_token_embeddings" in str(caught.value)
        assert encode(load_rows([inside, record]), tokenizer, max_length=60, vocab_size=table + 1).examples


# -- 11: EOS in the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace, wordpiece])
def test_eos_that_the_data_ends_with_is_learned_once(make: Any) -> None:
    tokenizer = make()
    assert learned({"prompt": "hi ", "completion": "yes</s>"}, tokenizer).endswith("yes</s>]]")
    for record in ({"prompt": "hi ", "completion": "yes</s>"}, {"text": "hi yes</s>"}, {"text": "hi yes"}):
        [example] = encoded(record, tokenizer).examples
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
        assert example.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_eos_that_an_answer_ends_with_is_learned_once(kind: str) -> None:
    tokenizer = tokenizer_for("zephyr", kind)
    right = "<|user|>\nhi</s>\n<|assistant|>\n[[yes</s>]]"
    assert comparable(tokenizer, learned(chat("yes</s>"), tokenizer)) == comparable(tokenizer, right)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
@pytest.mark.parametrize(
    ("template", "right"),
    [
        ("alpaca", "### Instruction:\nhi\n\n### Response:\n[[was <s>10</s> now 8\n\n</s>]]"),
        ("zephyr", "<|user|>\nhi</s>\n<|assistant|>\n[[was <s>10</s> now 8</s>]]"),
        ("chatml_as_text", IM_HI + "[[was <s>10</s> now 8<|im_end|>\n</s>]]"),
    ],
)
def test_eos_inside_an_answer_cuts_nothing_away(kind: str, template: str, right: str) -> None:
    tokenizer = tokenizer_for(template, kind)
    assert comparable(tokenizer, learned(chat("was <s>10</s> now 8"), tokenizer)) == comparable(tokenizer, right)


def test_eos_inside_a_completion_or_a_text_cuts_nothing_away() -> None:
    tokenizer = byte_level(special=("<s>",))
    assert learned({"prompt": "hi ", "completion": "was <s>10</s> now 8"}, tokenizer) == (
        "hi [[was <s>10</s> now 8</s>]]"
    )
    [example] = encoded({"text": "was <s>10</s> now 8"}, tokenizer).examples
    assert raw_text(tokenizer, example.input_ids) == "was <s>10</s> now 8</s>"


# -- 12: spaces that the data does not have --------------------------------------------------------------------------

SEAMS = [
    ("question: ", "the town", "question: [[the town</s>]]"),
    ("question: the ans", "wer is", "question: the ans[[wer is</s>]]"),
    ("question:", " the town", "question:[[ the town</s>]]"),
    ("question:", "\nthe town", "question:[[\nthe town</s>]]"),
    ("question:\n", "\n the town", "question:\n[[\n the town</s>]]"),
    ("question:  ", "  yes", "question:  [[  yes</s>]]"),
]


@pytest.mark.parametrize("variant", SENTENCE_PIECES)
@pytest.mark.parametrize(("prompt", "completion", "right"), SEAMS)
def test_a_completion_has_no_space_that_the_data_lacks(
    prompt: str, completion: str, right: str, variant: dict[str, Any]
) -> None:
    tokenizer = metaspace(bos="<s>", **variant)
    said = learned({"prompt": prompt, "completion": completion}, tokenizer)
    assert said.startswith("<s>") == variant["puts_bos"]
    assert said.count("<s>") == variant["puts_bos"]
    # SentencePiece puts one space before a text
    assert said.removeprefix("<s>").removeprefix(" ") == right


@pytest.mark.parametrize(("prompt", "completion", "right"), SEAMS)
def test_a_byte_level_completion_has_no_space_that_the_data_lacks(prompt: str, completion: str, right: str) -> None:
    tokenizer = byte_level()
    assert learned({"prompt": prompt, "completion": completion}, tokenizer) == right
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert learned({"prompt": prompt, "completion": completion}, tokenizer).removeprefix(" ") == right


@pytest.mark.parametrize("variant", SENTENCE_PIECES)
def test_an_answer_has_no_space_that_the_data_lacks(variant: dict[str, Any]) -> None:
    for name, right in (
        ("prompt_ends_in_space", "user: hi<|im_end|>\nassistant: [[yes<|im_end|>\n<|endoftext|>]]"),
        ("alpaca", "### Instruction:\nhi\n\n### Response:\n[[yes\n\n</s>]]"),
        ("openchat", "<s>GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:[[ yes<|end_of_turn|>]]"),
    ):
        tokenizer = tokenizer_for(name, "metaspace", **variant)
        said = learned({"messages": ONE}, tokenizer)
        assert comparable(tokenizer, said) == comparable(tokenizer, right)


# -- 13: rows that are too long --------------------------------------------------------------------------------------


def test_a_prompt_that_is_cut_keeps_bos() -> None:
    tokenizer = byte_level(bos="<s>")
    record = {"prompt": "the beginning " + "the town of York " * 30 + "the end:", "completion": " yes"}
    whole = encoded(record, tokenizer).examples[0].input_ids
    found = encoded(record, tokenizer, max_length=30)
    [example] = found.examples
    assert example.input_ids == whole[:1] + whole[-29:]
    assert marked(example, tokenizer).endswith("the end:[[ yes</s>]]")
    report = found.report.to_dict()
    assert (report["cut"], report["tokens_lost"]) == (1, len(whole) - 30)

    [example] = encoded(record, tokenizer, max_length=30, truncation="middle").examples
    said = marked(example, tokenizer)
    assert len(example.input_ids) == 30
    assert said.startswith("<s>the beg")
    assert said.endswith("the end:[[ yes</s>]]")
    with pytest.raises(DataError, match="row 1"):
        encoded(record, tokenizer, max_length=30, truncation="refuse")


def test_the_middle_of_a_long_chat_can_be_cut() -> None:
    tokenizer = tokenizer_for("llama3", "byte_level")
    long = {"role": "user", "content": "the town of York " * 30}
    record = {"messages": [{"role": "system", "content": "he said"}, long, {"role": "assistant", "content": "yes"}]}
    [example] = encoded(record, tokenizer, max_length=60).examples
    assert marked(example, tokenizer).startswith("<|begin_of_text|>")
    assert "he said" not in marked(example, tokenizer)
    [example] = encoded(record, tokenizer, max_length=60, truncation="middle").examples
    said = marked(example, tokenizer)
    assert len(example.input_ids) == 60
    assert said.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nhe said<|eot_id|>")
    assert said.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n[[yes<|eot_id|>]]")


def test_a_long_chat_learns_what_is_left_of_its_turns() -> None:
    """Where the beginning is cut, earlier turns go first, and no label stands where its text does not."""
    tokenizer = tokenizer_for("chatml", "byte_level")
    turns = [{**message, "content": f"{message['content']} {i}"} for i in range(8) for message in ONE]
    whole = learned({"messages": turns}, tokenizer)
    [example] = encoded({"messages": turns}, tokenizer).examples
    for longest in range(20, len(example.input_ids), 7):
        [cut] = encoded({"messages": turns}, tokenizer, max_length=longest).examples
        assert len(cut.input_ids) <= longest
        said = marked(cut, tokenizer)
        plain = said.replace("[[", "").replace("]]", "")
        assert whole.replace("[[", "").replace("]]", "").endswith(plain)
        # a first token is never learned: the first mark may stand later than in the whole, or not at all
        assert whole.endswith(said[said.index("]]") :])


# -- 14: answers that are special tokens -----------------------------------------------------------------------------


def test_a_completion_that_holds_special_tokens_is_learned_as_it_stands() -> None:
    tokenizer = byte_level(eos="<|endoftext|>", special=("<river>",))
    record = {"prompt": "hi", "completion": " yes<|endoftext|>"}
    assert learned(record, tokenizer) == "hi[[ yes<|endoftext|>]]"
    assert learned({"prompt": "hi", "completion": "<river>"}, tokenizer) == "hi[[<river><|endoftext|>]]"
