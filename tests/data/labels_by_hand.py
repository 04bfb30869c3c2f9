"""Conversations under each template, with what is to be learned of them between `[[` and `]]`, written out by hand.

Nothing here is computed by the code under test, nor by a template: the texts say what a person finds right. Several
texts for one conversation are several sequences, the one that holds the conversation's own rendering last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TODAY = "2026-02-03"


@dataclass(frozen=True)
class Case:
    """A conversation under a template: `learned` is one text for each sequence; or what its refusal says."""

    template: str
    name: str
    messages: list[dict[str, Any]]
    learned: tuple[str, ...] = ()
    refused: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        return {"messages": self.messages, **self.columns}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


def call(arguments: Any, name: str = "get_time", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def case(template: str, name: str, messages: list[dict[str, Any]], *learned: str, **more: Any) -> Case:
    return Case(template, name, messages, learned, **more)


def refused(template: str, name: str, messages: list[dict[str, Any]], why: str, **more: Any) -> Case:
    return Case(template, name, messages, refused=why, **more)


ONE = [user("hi"), bot("yes")]
TWO = [*ONE, user("ho"), bot("no")]
SYSTEM = [system("he said"), *ONE]
THOUGHT = "<think>\nthe reason\n</think>\n"
BECAUSE = "<think>\nbecause\n</think>\n"
CITY = {"city": "York"}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]
TOOLS_TEXT = '{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}'
CALLED = [user("what time"), bot(None, tool_calls=[call(CITY)]), tool("10:15"), bot("ten")]
#: what refuses a row whose prompt the rendering does not begin with, or in whose rendering a message is missing, has
#: words of its own: the row's name is checked for all
ANY = "."

IM_HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
IM_HO = "\n<|im_start|>user\nho<|im_end|>\n<|im_start|>assistant\n"
HERMES_SYSTEM = f"<|im_start|>system\n# Tools\n<tools>\n{TOOLS_TEXT}\n</tools><|im_end|>\n"
HERMES_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"city": "York"}}\n</tool_call>'
HERMES_ANSWERED = (
    "<|im_start|>user\nwhat time<|im_end|>\n<|im_start|>assistant\n"
    f"[[{HERMES_CALL}<|im_end|>]]\n<|im_start|>user\n<tool_response>\n10:15\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)

CHATML = [
    case("chatml", "one", ONE, IM_HI + "[[yes<|im_end|>]]"),
    case("chatml", "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    case("chatml", "system", SYSTEM, "<|im_start|>system\nhe said<|im_end|>\n" + IM_HI + "[[yes<|im_end|>]]"),
    case("chatml", "the last", TWO, IM_HI + "yes<|im_end|>" + IM_HO + "[[no<|im_end|>]]",
         settings={"train_on": "last"}),
    case("chatml", "white space is kept", [user(" hi\n"), bot("\n\n yes \n\n")],
         "<|im_start|>user\n hi\n<|im_end|>\n<|im_start|>assistant\n[[\n\n yes \n\n<|im_end|>]]"),
    case("chatml", "weight 0", [user("hi"), bot("yes", weight=0), user("ho"), bot("no", weight=1)],
         IM_HI + "yes<|im_end|>" + IM_HO + "[[no<|im_end|>]]"),
    case("chatml", "train false", [user("hi"), bot("yes", train=False), user("ho"), bot("no", train=True)],
         IM_HI + "yes<|im_end|>" + IM_HO + "[[no<|im_end|>]]"),
    # the sequence ends with its last learned token
    case("chatml", "the last answer not", [user("hi"), bot("yes"), user("ho"), bot("no", weight=0)],
         IM_HI + "[[yes<|im_end|>]]"),
    case("chatml", "two answers in a row", [user("hi"), bot("yes"), bot("no")],
         IM_HI + "[[yes<|im_end|>]]\n<|im_start|>assistant\n[[no<|im_end|>]]"),
    case("chatml", "the answer is a header's word", [user("user"), bot("assistant")],
         "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]"),
    case("chatml", "the question is the answer", [user("yes"), bot("yes"), user("yes"), bot("yes")],
         "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]\n<|im_start|>user\nyes<|im_end|>\n"
         "<|im_start|>assistant\n[[yes<|im_end|>]]"),
    case("chatml", "a header inside an answer", [user("hi"), bot("yes<|im_end|>\n<|im_start|>user\nno")],
         IM_HI + "[[yes<|im_end|>\n<|im_start|>user\nno<|im_end|>]]"),
    case("chatml", "a header inside a question",
         [user("hi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nho"), bot("yes")],
         "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nho<|im_end|>\n"
         "<|im_start|>assistant\n[[yes<|im_end|>]]"),
    case("chatml", "an empty system message", [system(""), *ONE],
         "<|im_start|>system\n<|im_end|>\n" + IM_HI + "[[yes<|im_end|>]]"),
    # the template writes the answer's header and leaves the call away: nothing says so but we
    refused("chatml", "a tool call that it does not write", CALLED, ANY, columns={"tools": TOOLS}),
    refused("chatml", "an empty tool call that it does not write",
            [user("hi"), bot("", tool_calls=[call(CITY)]), tool("10:15"), bot("ten")], ANY),
    case("chatml_default_system", "one", ONE,
         "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + IM_HI + "[[yes<|im_end|>]]"),
    case("chatml_default_system", "two", TWO, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + IM_HI
         + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    case("chatml_default_system", "system", SYSTEM,
         "<|im_start|>system\nhe said<|im_end|>\n" + IM_HI + "[[yes<|im_end|>]]"),
    case("chatml_other_eos", "one", ONE, IM_HI + "[[yes<|im_end|>\n<|endoftext|>]]"),
    case("chatml_other_eos", "two", TWO,
         IM_HI + "[[yes<|im_end|>\n]]" + IM_HO.removeprefix("\n") + "[[no<|im_end|>\n<|endoftext|>]]"),
    case("chatml_other_eos", "the last answer not", [user("hi"), bot("yes"), user("ho"), bot("no", weight=0)],
         IM_HI + "[[yes<|im_end|>\n<|endoftext|>]]"),
    case("chatml_other_eos", "EOS inside an answer", [user("hi"), bot("yes<|endoftext|>no")],
         IM_HI + "[[yes<|endoftext|>no<|im_end|>\n<|endoftext|>]]"),
    case("chatml_as_text", "one", ONE, IM_HI + "[[yes<|im_end|>\n</s>]]"),
    case("chatml_as_text", "two", TWO,
         IM_HI + "[[yes<|im_end|>\n]]" + IM_HO.removeprefix("\n") + "[[no<|im_end|>\n</s>]]"),
    case("chatml_as_text", "EOS inside an answer", [user("hi"), bot("was <s>10</s> now 8")],
         IM_HI + "[[was <s>10</s> now 8<|im_end|>\n</s>]]"),
    case("hermes", "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    case("hermes", "tools", CALLED, HERMES_SYSTEM + HERMES_ANSWERED + "[[ten<|im_end|>]]", columns={"tools": TOOLS}),
    case("hermes", "arguments as JSON text",
         [user("what time"), bot("", tool_calls=[call('{"city": "York"}')]), tool("10:15"), bot("ten")],
         HERMES_SYSTEM + HERMES_ANSWERED + "[[ten<|im_end|>]]", columns={"tools": [TOOLS_TEXT]}),
    case("hermes", "tools as JSON text", CALLED, HERMES_SYSTEM + HERMES_ANSWERED + "[[ten<|im_end|>]]",
         columns={"tools": f"[{TOOLS_TEXT}]"}),
    case("hermes", "a call is the last", CALLED[:2],
         "<|im_start|>user\nwhat time<|im_end|>\n<|im_start|>assistant\n[[" + HERMES_CALL + "<|im_end|>]]"),
    case("hermes", "words and two calls", [user("hi"), bot("yes", tool_calls=[call(CITY), call({}, "no")])],
         IM_HI + "[[yes\n" + HERMES_CALL
         + '\n<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call><|im_end|>]]'),
]  # fmt: skip

THINKING = [
    case("qwen3", "one", ONE, IM_HI + "[[<think>\n\n</think>\n\nyes<|im_end|>]]"),
    case("qwen3", "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[<think>\n\n</think>\n\nno<|im_end|>]]"),
    case("qwen3", "a thought", [user("hi"), bot(THOUGHT + "\nyes")],
         IM_HI + "[[<think>\nthe reason\n</think>\n\nyes<|im_end|>]]"),
    case("qwen3", "a thought in its field", [user("hi"), bot("yes", reasoning_content="the reason")],
         IM_HI + "[[<think>\nthe reason\n</think>\n\nyes<|im_end|>]]"),
    case("qwen3", "two thoughts", [user("hi"), bot(THOUGHT + "\nyes"), user("ho"), bot(BECAUSE + "\nno")],
         IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[<think>\nbecause\n</think>\n\nno<|im_end|>]]"),
    case("qwen3", "tools", CALLED, HERMES_SYSTEM + HERMES_ANSWERED + "[[<think>\n\n</think>\n\nten<|im_end|>]]",
         columns={"tools": TOOLS}),
    case("qwen3", "a thought before a call",
         [user("hi"), bot("", reasoning_content="the reason", tool_calls=[call(CITY)]), tool("10:15"),
          bot("ten", reasoning_content="because")],
         IM_HI + "[[<think>\nthe reason\n</think>\n\n" + HERMES_CALL + "<|im_end|>]]\n<|im_start|>user\n"
         "<tool_response>\n10:15\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
         "[[<think>\nbecause\n</think>\n\nten<|im_end|>]]"),
    case("qwen3", "thinking off", ONE, IM_HI + "<think>\n\n</think>\n\n[[yes<|im_end|>]]",
         columns={"chat_template_kwargs": {"enable_thinking": False}}),
    case("qwen3", "thinking off, two", TWO, IM_HI + "<think>\n\n</think>\n\n[[yes<|im_end|>]]",
         IM_HI + "yes<|im_end|>" + IM_HO + "<think>\n\n</think>\n\n[[no<|im_end|>]]",
         columns={"chat_template_kwargs": {"enable_thinking": False}}),
    refused("qwen3", "thinking off with a thought", [user("hi"), bot(THOUGHT + "\nyes")], ANY,
            columns={"chat_template_kwargs": {"enable_thinking": False}}),
    case("qwq", "a thought", [user("hi"), bot(THOUGHT + "yes")],
         IM_HI + "<think>\n[[the reason\n</think>\nyes<|im_end|>]]"),
    case("qwq", "two thoughts", [user("hi"), bot(THOUGHT + "yes"), user("ho"), bot(BECAUSE + "no")],
         IM_HI + "<think>\n[[the reason\n</think>\nyes<|im_end|>]]",
         IM_HI + "yes<|im_end|>" + IM_HO + "<think>\n[[because\n</think>\nno<|im_end|>]]"),
    case("qwq", "the last of two thoughts", [user("hi"), bot(THOUGHT + "yes"), user("ho"), bot(BECAUSE + "no")],
         IM_HI + "yes<|im_end|>" + IM_HO + "<think>\n[[because\n</think>\nno<|im_end|>]]",
         settings={"train_on": "last"}),
    case("qwq", "a turn without a thought that is not learned",
         [user("hi"), bot("yes", weight=0), user("ho"), bot(BECAUSE + "no")],
         IM_HI + "yes<|im_end|>" + IM_HO + "<think>\n[[because\n</think>\nno<|im_end|>]]"),
    case("qwq", "an empty thought", [user("hi"), bot("<think>\n\n</think>\nyes")],
         IM_HI + "<think>\n[[\n</think>\nyes<|im_end|>]]"),
    refused("qwq", "no thought", ONE, ANY),
    refused("qwq", "no thought in the first of two", [user("hi"), bot("yes"), user("ho"), bot(BECAUSE + "no")], ANY),
    case("empty_thought", "one", ONE, IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]"),
    case("empty_thought", "two", TWO, IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]" + IM_HO
         + "<think>\n[[\n</think>\n\nno<|im_end|>]]"),
    case("empty_thought_tokens", "one", ONE, IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]"),
    case("empty_thought_tokens", "two", TWO, IM_HI + "<think>\n[[\n</think>\n\nyes<|im_end|>]]" + IM_HO
         + "<think>\n[[\n</think>\n\nno<|im_end|>]]"),
    case("thoughts_kept", "one without", ONE, IM_HI + "[[yes<|im_end|>]]"),
    case("thoughts_kept", "two",
         [user("hi"), bot("yes", reasoning_content="the reason"), user("ho"), bot("no", reasoning_content="because")],
         IM_HI + "[[<think>\nthe reason\n</think>\nyes<|im_end|>]]" + IM_HO
         + "[[<think>\nbecause\n</think>\nno<|im_end|>]]"),
    refused("deepseek_r1", "one", ONE, ANY),
    refused("deepseek_r1", "a thought", [user("hi"), bot(THOUGHT + "yes")], ANY),
    case("deepseek_v3", "two", TWO,
         "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>[[yes<｜end▁of▁sentence｜>]]<｜User｜>ho<｜Assistant｜>"
         "[[no<｜end▁of▁sentence｜>]]"),
    case("deepseek_v3", "system", SYSTEM,
         "<｜begin▁of▁sentence｜>he said<｜User｜>hi<｜Assistant｜>[[yes<｜end▁of▁sentence｜>]]"),
    # where the template cuts a thought, what it leaves is learned
    case("deepseek_v3", "a thought", [user("hi"), bot(THOUGHT + "yes")],
         "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>[[\nyes<｜end▁of▁sentence｜>]]"),
    case("deepseek_v2", "two", TWO,
         "<｜begin▁of▁sentence｜>User: hi\n\nAssistant:[[ yes<｜end▁of▁sentence｜>]]User: ho\n\nAssistant:"
         "[[ no<｜end▁of▁sentence｜>]]"),
    case("deepseek_v2", "system", SYSTEM,
         "<｜begin▁of▁sentence｜>he said\n\nUser: hi\n\nAssistant:[[ yes<｜end▁of▁sentence｜>]]"),
    case("harmony", "one", ONE,
         "<|start|>system<|message|>Current date: 2026-02-03<|end|><|start|>user<|message|>hi<|end|><|start|>assistant"
         "[[<|channel|>final<|message|>yes<|return|>]]"),
    # a model that is asked has to write <|return|>: the <|end|> of an answer that has become history is not learned
    case("harmony", "two", TWO,
         "<|start|>system<|message|>Current date: 2026-02-03<|end|><|start|>user<|message|>hi<|end|><|start|>assistant"
         "[[<|channel|>final<|message|>yes]]<|end|><|start|>user<|message|>ho<|end|><|start|>assistant"
         "[[<|channel|>final<|message|>no<|return|>]]"),
    case("harmony", "two thoughts",
         [user("hi"), bot("yes", reasoning_content="the reason"), user("ho"), bot("no", reasoning_content="because")],
         "<|start|>system<|message|>Current date: 2026-02-03<|end|><|start|>user<|message|>hi<|end|><|start|>assistant"
         "[[<|channel|>final<|message|>yes]]<|end|><|start|>user<|message|>ho<|end|><|start|>assistant"
         "[[<|channel|>analysis<|message|>because<|end|><|start|>assistant<|channel|>final<|message|>no<|return|>]]"),
    case("harmony", "tools", CALLED,
         "<|start|>system<|message|>Current date: 2026-02-03<|end|><|start|>user<|message|>what time<|end|>"
         '<|start|>assistant[[ to=functions.get_time<|channel|>commentary json<|message|>{"city": "York"}<|call|>]]'
         "<|start|>functions<|message|>10:15<|end|><|start|>assistant[[<|channel|>final<|message|>ten<|return|>]]"),
]  # fmt: skip

L3_HI = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
L3_HO = "<|start_header_id|>user<|end_header_id|>\n\nho<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
L3_ASKED = (
    "<|start_header_id|>user<|end_header_id|>\n\nwhat time<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
L3_DATE = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
#: Llama-2 and the first Mistral write no generation prompt, and a space before the answer: no header, but what a
#: model that is asked with the template alone has to write itself
LLAMA_MISTRAL = [
    case("llama2", "one", ONE, "<s>[INST] hi [/INST][[ yes </s>]]"),
    case("llama2", "two", TWO, "<s>[INST] hi [/INST][[ yes </s>]]<s>[INST] ho [/INST][[ no </s>]]"),
    case("llama2", "system", SYSTEM, "<s>[INST] <<SYS>>\nhe said\n<</SYS>>\n\nhi [/INST][[ yes </s>]]"),
    case("llama2", "stripped", [user(" hi\n"), bot("\n yes ")], "<s>[INST] hi [/INST][[ yes </s>]]"),
    refused("llama2", "roles that do not alternate", [user("hi"), user("ho"), bot("yes")], "roles must alternate"),
    case("llama3", "one", ONE, "<|begin_of_text|>" + L3_HI + "[[yes<|eot_id|>]]"),
    case("llama3", "two", TWO, "<|begin_of_text|>" + L3_HI + "[[yes<|eot_id|>]]" + L3_HO + "[[no<|eot_id|>]]"),
    case("llama3", "system", SYSTEM, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nhe said<|eot_id|>"
         + L3_HI + "[[yes<|eot_id|>]]"),
    case("llama3", "stripped", [user(" hi\n"), bot("\n yes ")], "<|begin_of_text|>" + L3_HI + "[[yes<|eot_id|>]]"),
    case("llama31", "one", ONE, L3_DATE + "Today Date: 03 Feb 2026\n\n<|eot_id|>" + L3_HI + "[[yes<|eot_id|>]]"),
    case("llama31", "system", [*SYSTEM, user("ho"), bot("no")],
         L3_DATE + "Today Date: 03 Feb 2026\n\nhe said<|eot_id|>" + L3_HI + "[[yes<|eot_id|>]]" + L3_HO
         + "[[no<|eot_id|>]]"),
    case("llama31", "tools", CALLED,
         L3_DATE + "Environment: ipython\nToday Date: 03 Feb 2026\n\n" + TOOLS_TEXT + "\n\n<|eot_id|>" + L3_ASKED
         + '[[{"name": "get_time", "parameters": {"city": "York"}}<|eot_id|>]]'
         '<|start_header_id|>ipython<|end_header_id|>\n\n"10:15"<|eot_id|>'
         "<|start_header_id|>assistant<|end_header_id|>\n\n[[ten<|eot_id|>]]", columns={"tools": TOOLS}),
    refused("llama31", "two calls at once", [user("hi"), bot("", tool_calls=[call(CITY), call(CITY)])],
            "only supports single tool-calls"),
    case("llama32_python", "a call", [*CALLED[:2], {"role": "ipython", "content": "10:15"}, bot("ten")],
         "<|begin_of_text|>" + L3_ASKED + '[[<|python_tag|>get_time.call(city="York")<|eom_id|>]]'
         "<|start_header_id|>ipython<|end_header_id|>\n\n10:15<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n[[ten<|eot_id|>]]"),
    case("llama32_python", "a call is the last", CALLED[:2],
         "<|begin_of_text|>" + L3_ASKED + '[[<|python_tag|>get_time.call(city="York")<|eom_id|><|eot_id|>]]'),
    case("mistral_v1", "two", TWO, "<s>[INST] hi [/INST][[ yes</s>]][INST] ho [/INST][[ no</s>]]"),
    case("mistral_v1", "system", SYSTEM, "<s>[INST] he said\n\nhi [/INST][[ yes</s>]]"),
    refused("mistral_v1", "roles that do not alternate", [user("hi"), bot("yes"), bot("no")], "roles must alternate"),
    case("mistral_raises", "two", TWO, "<s>[INST]hi[/INST][[yes</s>]][INST]ho[/INST][[no</s>]]"),
    refused("mistral_raises", "system", SYSTEM, "System role not supported"),
    case("mistral_v3", "two", TWO, "<s>[INST]hi[/INST][[yes</s>]][INST]ho[/INST][[no</s>]]"),
    case("mistral_v3", "system", SYSTEM, "<s>[INST]he said\n\nhi[/INST][[yes</s>]]"),
    case("mistral_v3", "tools",
         [user("hi"), bot("", tool_calls=[call(CITY, id="abcdefghi")]), tool("10:15", tool_call_id="abcdefghi"),
          bot("ten")],
         f"<s>[AVAILABLE_TOOLS][{TOOLS_TEXT}][/AVAILABLE_TOOLS][INST]hi[/INST]"
         '[[[TOOL_CALLS][{"name": "get_time", "arguments": {"city": "York"}, "id": "abcdefghi"}]</s>]]'
         '[TOOL_RESULTS]{"content": "10:15", "call_id": "abcdefghi"}[/TOOL_RESULTS][[ten</s>]]',
         columns={"tools": TOOLS}),
    refused("mistral_v3", "another sort of call's id",
            [user("hi"), bot("", tool_calls=[call(CITY, id="call_1")]), tool("10:15", tool_call_id="call_1"),
             bot("ten")], "length 9"),
]  # fmt: skip

VICUNA = "A chat between a curious user and an assistant. USER: hi ASSISTANT:"
GRANITE = "<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n"
GRANITE_HI = "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
COHERE_HI = (
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    "[[yes<|END_OF_TURN_TOKEN|>]]"
)
FAMILIES = [
    case("gemma", "two", TWO,
         "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[yes<end_of_turn>]]\n<start_of_turn>user\n"
         "ho<end_of_turn>\n<start_of_turn>model\n[[no<end_of_turn>]]"),
    case("gemma", "trimmed", [user(" hi "), bot("yes\n\n")],
         "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[yes<end_of_turn>]]"),
    refused("gemma", "system", SYSTEM, "System role not supported"),
    refused("gemma", "roles that do not alternate", [user("hi"), user("ho"), bot("yes")], "roles must alternate"),
    case("gemma_other_eos", "two", TWO,
         "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n[[yes<end_of_turn>\n]]<start_of_turn>user\n"
         "ho<end_of_turn>\n<start_of_turn>model\n[[no<end_of_turn>\n<eos>]]"),
    case("gemma2_folded", "system", [*SYSTEM, user("ho"), bot("no")],
         "<bos><start_of_turn>user\nhe said\n\nhi<end_of_turn>\n<start_of_turn>model\n[[yes<end_of_turn>]]\n"
         "<start_of_turn>user\nho<end_of_turn>\n<start_of_turn>model\n[[no<end_of_turn>]]"),
    case("phi3", "one", ONE, "<|user|>\nhi<|end|>\n<|assistant|>\n[[yes<|end|>\n<|endoftext|>]]"),
    case("phi3", "two", TWO, "<|user|>\nhi<|end|>\n<|assistant|>\n[[yes<|end|>\n]]<|user|>\nho<|end|>\n<|assistant|>\n"
         "[[no<|end|>\n<|endoftext|>]]"),
    case("phi4", "two", [system("he said"), *TWO],
         "<|im_start|>system<|im_sep|>he said<|im_end|><|im_start|>user<|im_sep|>hi<|im_end|><|im_start|>assistant"
         "<|im_sep|>[[yes<|im_end|>]]<|im_start|>user<|im_sep|>ho<|im_end|><|im_start|>assistant<|im_sep|>"
         "[[no<|im_end|>]]"),
    case("zephyr", "two", [system("he said"), *TWO],
         "<|system|>\nhe said</s>\n<|user|>\nhi</s>\n<|assistant|>\n[[yes</s>]]\n<|user|>\nho</s>\n<|assistant|>\n"
         "[[no</s>]]"),
    case("zephyr", "EOS inside an answer", [user("hi"), bot("was <s>10</s> now 8")],
         "<|user|>\nhi</s>\n<|assistant|>\n[[was <s>10</s> now 8</s>]]"),
    case("tulu", "two", TWO, "<|user|>\nhi\n<|assistant|>\n[[yes<|endoftext|>]]\n<|user|>\nho\n<|assistant|>\n"
         "[[no<|endoftext|>]]"),
    case("vicuna", "two", TWO, VICUNA + "[[ yes</s>]]USER: ho ASSISTANT:[[ no</s>]]"),
    case("vicuna", "system", SYSTEM, "he said USER: hi ASSISTANT:[[ yes</s>]]"),
    case("vicuna", "the prompt's words in an answer", [user("hi"), bot("USER: ho ASSISTANT: no")],
         VICUNA + "[[ USER: ho ASSISTANT: no</s>]]"),
    case("alpaca", "one", ONE, "### Instruction:\nhi\n\n### Response:\n[[yes\n\n</s>]]"),
    case("alpaca", "two", TWO, "### Instruction:\nhi\n\n### Response:\n[[yes\n\n]]### Instruction:\nho\n\n"
         "### Response:\n[[no\n\n</s>]]"),
    case("alpaca", "system", SYSTEM, "he said\n\n### Instruction:\nhi\n\n### Response:\n[[yes\n\n</s>]]"),
    case("alpaca", "EOS inside an answer", [user("hi"), bot("was <s>10</s> now 8")],
         "### Instruction:\nhi\n\n### Response:\n[[was <s>10</s> now 8\n\n</s>]]"),
    refused("alpaca", "a tool's result", [user("hi"), tool("10:15"), bot("ten")], ANY),
    case("command_r", "one", ONE, "<BOS_TOKEN>" + COHERE_HI),
    case("command_r", "two", TWO, "<BOS_TOKEN>" + COHERE_HI + COHERE_HI.replace("hi", "ho").replace("yes", "no")),
    case("command_r", "documents", SYSTEM,
         "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>he said<results>\nDocument: 0\nYork\na town\n</results>"
         "<|END_OF_TURN_TOKEN|>" + COHERE_HI, columns={"documents": [{"title": "York", "text": "a town"}]}),
    case("command_r", "documents as JSON text", ONE,
         "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\nDocument: 0\nYork\na town\n</results>"
         "<|END_OF_TURN_TOKEN|>" + COHERE_HI, columns={"documents": '[{"title": "York", "text": "a town"}]'}),
    case("granite", "two", TWO, GRANITE + GRANITE_HI + "[[yes<|end_of_text|>]]\n" + GRANITE_HI.replace("hi", "ho")
         + "[[no<|end_of_text|>]]"),
    case("granite", "documents", ONE, GRANITE + "<|start_of_role|>document<|end_of_role|>a town<|end_of_text|>\n"
         + GRANITE_HI + "[[yes<|end_of_text|>]]", columns={"documents": [{"text": "a town"}]}),
    case("granite", "a call", [user("hi"), bot(None, tool_calls=[call(CITY)]), tool("10:15"), bot("ten")],
         GRANITE + GRANITE_HI + '[[<|tool_call|>[{"name": "get_time", "arguments": {"city": "York"}}]<|end_of_text|>]]'
         "\n<|start_of_role|>tool<|end_of_role|>10:15<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
         "[[ten<|end_of_text|>]]"),
    case("falcon", "one", ONE, "User: hi\nFalcon:[[ yes<|endoftext|>]]"),
    case("falcon", "two", TWO, "User: hi\nFalcon:[[ yes]]\nUser: ho\nFalcon:[[ no<|endoftext|>]]"),
    case("falcon", "system", SYSTEM, "System: he said\nUser: hi\nFalcon:[[ yes<|endoftext|>]]"),
    case("openchat", "two", TWO,
         "<s>GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:[[ yes<|end_of_turn|>]]GPT4 Correct User: ho"
         "<|end_of_turn|>GPT4 Correct Assistant:[[ no<|end_of_turn|>]]"),
    case("glm4", "one", ONE, "[gMASK]<sop><|user|>\nhi<|assistant|>\n[[yes<|endoftext|>]]"),
    case("glm4", "two", TWO,
         "[gMASK]<sop><|user|>\nhi<|assistant|>\n[[yes]]<|user|>\nho<|assistant|>\n[[no<|endoftext|>]]"),
]  # fmt: skip

#: marks, generation prompts and white space
FORMS = [
    *(
        case(name, "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]")
        for name in ("marked", "marked_line_end", "marked_eos_outside", "marked_header", "no_prompt", "always_prompt")
    ),
    *(
        case(name, "the first alone", [*ONE, user("ho"), bot("no", weight=0)], IM_HI + "[[yes<|im_end|>]]")
        for name in ("marked", "marked_line_end", "marked_eos_outside", "marked_header", "no_prompt", "always_prompt")
    ),
    *(
        case(name, "the last alone", TWO, IM_HI + "yes<|im_end|>" + IM_HO + "[[no<|im_end|>]]",
             settings={"train_on": "last"})
        for name in ("marked", "marked_line_end", "marked_eos_outside", "marked_header", "no_prompt", "always_prompt")
    ),
    *(
        case(name, "the answer is a header's word", [user("assistant"), bot("assistant"), user("hi"), bot("user")],
             "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]\n"
             "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[user<|im_end|>]]")
        for name in ("marked", "marked_header", "no_prompt", "always_prompt")
    ),
    case("no_prompt", "white space before the answer", [user("hi"), bot("\n\nyes")],
         IM_HI + "[[\n\nyes<|im_end|>]]"),
    case("no_prompt_other_eos", "one", ONE, IM_HI + "[[yes<|im_end|>\n<|endoftext|>]]"),
    case("no_prompt_other_eos", "two", TWO,
         IM_HI + "[[yes<|im_end|>\n]]" + IM_HO.removeprefix("\n") + "[[no<|im_end|>\n<|endoftext|>]]"),
    case("always_prompt_other_eos", "one", ONE, IM_HI + "[[yes<|im_end|>\n<|endoftext|>]]"),
    case("always_prompt_other_eos", "two", TWO,
         IM_HI + "[[yes<|im_end|>\n]]" + IM_HO.removeprefix("\n") + "[[no<|im_end|>\n<|endoftext|>]]"),
    case("always_prompt_other_eos", "the header in the answer", [user("hi"), bot("yes<|im_start|>assistant\n")],
         IM_HI + "[[yes<|im_start|>assistant\n<|im_end|>\n<|endoftext|>]]"),
    case("prompt_ends_in_space", "one", ONE, "user: hi<|im_end|>\nassistant: [[yes<|im_end|>\n<|endoftext|>]]"),
    case("prompt_ends_in_space", "two", TWO,
         "user: hi<|im_end|>\nassistant: [[yes<|im_end|>\n]]user: ho<|im_end|>\nassistant: "
         "[[no<|im_end|>\n<|endoftext|>]]"),
    case("prompt_ends_in_space", "a space before the answer", [user("hi"), bot(" yes")],
         "user: hi<|im_end|>\nassistant: [[ yes<|im_end|>\n<|endoftext|>]]"),
    case("trimmed", "two", [user(" hi\n"), bot("\n\nyes "), user("ho"), bot("no")],
         "<|user|> hi \n\n<|assistant|> [[yes \n\n]]<|user|> ho \n\n<|assistant|> [[no \n\n</s>]]"),
    case("closed_between", "two", TWO, "<|user|>hi<|bot|>[[yes</s>]]<|user|>ho<|bot|>[[no</s>]]"),
    case("skips_unknown_roles", "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    case("skips_unknown_roles", "names of roles",
         [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "yes"},
          {"role": "User", "content": "ho"}, {"role": "model", "content": "no"}],
         IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    refused("skips_unknown_roles", "a tool", [user("hi"), tool("10:15"), bot("ten")], "tool"),
    refused("skips_unknown_roles", "a developer", [{"role": "developer", "content": "he said"}, *ONE], "developer"),
    case("raises_on_unknown_roles", "two", TWO, IM_HI + "[[yes<|im_end|>]]" + IM_HO + "[[no<|im_end|>]]"),
    refused("raises_on_unknown_roles", "a tool", [user("hi"), tool("10:15"), bot("ten")], "unknown role tool"),
]  # fmt: skip

CASES = [*CHATML, *THINKING, *LLAMA_MISTRAL, *FAMILIES, *FORMS]
