"""Chat templates that behave as those of real families do, written after what is documented of them.

A template here has what its family is known for (how turns begin and end, what becomes of system messages, thoughts
and tool calls, what it refuses), not all that the family's own file can do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.tokenizers_zoo import byte_level, metaspace, wordpiece

MAKERS = {"byte_level": byte_level, "metaspace": metaspace, "wordpiece": wordpiece}


@dataclass(frozen=True)
class Template:
    """A template and the special tokens that go with it.

    `prompt` says when it writes a generation prompt: "asked" for one (as nearly all do), "never" or "always".
    """

    text: str
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    prompt: str = "asked"


@functools.cache
def tokenizer_for(name: str, kind: str, **variant: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind with that template and its special tokens."""
    template = TEMPLATES[name]
    made = MAKERS[kind](template.eos, template.bos, template.special, template.added, **variant)
    made.chat_template = template.text
    return made


def prompt(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


def turns(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


#: the roles must alternate, as with Llama-2, Mistral and Gemma
ALTERNATE = (
    "{% for m in chat %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
#: a system message is taken off the front: `system` and `chat`
SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set chat = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set chat = messages %}{% endif %}"
)
IM = ("<|im_start|>",)
CHATML = turns(r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}")
CHATML_PROMPT = prompt(r"<|im_start|>assistant\n")
#: the calls of a message as Hermes and Qwen write them
HERMES_CALLS = (
    r"{% for c in m.tool_calls or [] %}{{ '\n' if content or not loop.first }}"
    r"""{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}{{ c.function.arguments | tojson }}"""
    r"{{ '}\n</tool_call>' }}{% endfor %}"
)
HERMES_TOOLS = (
    r"{% if tools %}{{ '<|im_start|>system\n' + system + '# Tools\n<tools>' }}{% for t in tools %}{{ '\n' }}"
    r"{{ t | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    r"{% elif system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
)
TOOL_RESPONSE = r"{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
HERMES = (
    SPLIT_SYSTEM + HERMES_TOOLS + r"{% for m in chat %}{% set content = m.content or '' %}"
    r"{% if m.role == 'tool' %}" + TOOL_RESPONSE + r"{% else %}{{ '<|im_start|>' + m.role + '\n' + content }}"
    + HERMES_CALLS + r"{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + CHATML_PROMPT
)  # fmt: skip
QWEN3 = (
    SPLIT_SYSTEM + HERMES_TOOLS + r"{% set ns = namespace(asked=-1) %}{% for m in chat %}"
    r"{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    r"{% for m in chat %}{% set content = m.content or '' %}{% if m.role == 'tool' %}" + TOOL_RESPONSE
    + r"{% elif m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    r"{% if not thought and '</think>' in content %}"
    r"{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    r"{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    r"{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    r"{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}" + HERMES_CALLS
    + r"{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}"
    r"{% endfor %}" + CHATML_PROMPT
    + r"{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    r"{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)  # fmt: skip
#: the thoughts of all turns but the last are cut, and prompts begin a thought
QWQ = turns(
    r"{% set content = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    r"{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    r"{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
) + prompt(r"<|im_start|>assistant\n<think>\n")
EMPTY_THOUGHT = turns(
    r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    r"{{ m.content + '<|im_end|>\n' }}"
) + prompt(r"<|im_start|>assistant\n<think>\n")
#: thoughts are cut everywhere, even in the last answer, which so never begins as its prompt ends
DEEPSEEK_R1 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + "{{ system }}{% for m in chat %}{% if m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    + prompt(r"<｜Assistant｜><think>\n")
)  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK_R1.replace(r"<think>\n", "")
THOUGHTS_KEPT = (
    turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        r"{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    )
    + CHATML_PROMPT
)
DEEPSEEK_V2 = (
    "{{ bos_token }}"
    + turns(
        r"{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        r"{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
    )
    + prompt("Assistant:")
)
LLAMA2 = (
    SPLIT_SYSTEM + ALTERNATE + r"{% for m in chat %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    r"{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    r"{{ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    r"{% endfor %}"
)  # fmt: skip
HEADER = r"'<|start_header_id|>' + %s + '<|end_header_id|>\n\n'"
LLAMA3_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
LLAMA3_PROMPT = prompt(r"<|start_header_id|>assistant<|end_header_id|>\n\n")
LLAMA3 = "{{ bos_token }}" + turns("{{ " + HEADER % "m.role" + " + m.content.strip() + '<|eot_id|>' }}") + LLAMA3_PROMPT
#: the system message always stands there, with the date, and tools are listed in it
LLAMA31 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + r"{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    r"{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    r"{% for t in tools or [] %}{{ t | tojson }}{{ '\n\n' }}{% endfor %}{{ system.strip() + '<|eot_id|>' }}"
    "{% for m in chat %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{{ " + HEADER % "'assistant'"
    + r""" + '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}"""
    r"{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' or m.role == 'ipython' %}{{ " + HEADER % "'ipython'" + " }}{{ m.content | tojson }}"
    "{{ '<|eot_id|>' }}{% else %}{{ " + HEADER % "m.role" + " + m.content.strip() + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}" + LLAMA3_PROMPT
)  # fmt: skip
#: built-in tools are called as Python behind a tag
LLAMA32_PYTHON = (
    "{{ bos_token }}{% for m in messages %}{{ " + HEADER % "m.role" + " }}"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}{{ '<|python_tag|>' + c.name + '.call(' }}"
    "{% for k, v in c.arguments | items %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %}"
    "{{ ')<|eom_id|>' }}{% else %}{{ m.content.strip() + '<|eot_id|>' }}{% endif %}{% endfor %}" + LLAMA3_PROMPT
)
MISTRAL_V1 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + ALTERNATE + r"{% for m in chat %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    r"{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    r"{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set chat = messages %}"
)
MISTRAL_RAISES = (
    "{{ bos_token }}" + NO_SYSTEM + ALTERNATE + "{% for m in chat %}{% if m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{ bos_token }}" + SPLIT_SYSTEM + r"{% for m in chat %}{% if m.role == 'user' %}"
    r"{% if tools and loop.first %}{{ '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    r"{{ '[INST]' }}{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    r"{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    r"""{{ '[TOOL_RESULTS]{"content": ' }}{{ m.content | tojson }}{{ ', "call_id": "' + m.tool_call_id }}"""
    r"""{{ '"}[/TOOL_RESULTS]' }}{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}"""
    r"""{{ '{"name": "' + c.function.name + '", "arguments": ' }}{{ c.function.arguments | tojson }}"""
    r"""{{ ', "id": "' + c.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"""
    r"{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
MISTRAL_SPECIAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
GEMMA_TURNS = (
    r"{% for m in chat %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}%s"
    r"{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
)
GEMMA_PROMPT = prompt(r"<start_of_turn>model\n")
GEMMA = "{{ bos_token }}" + NO_SYSTEM + ALTERNATE + GEMMA_TURNS.replace("%s", "") + GEMMA_PROMPT
GEMMA2_FOLDED = (
    "{{ bos_token }}" + SPLIT_SYSTEM + ALTERNATE
    + GEMMA_TURNS.replace("%s", r"{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}") + GEMMA_PROMPT
)  # fmt: skip
PHI3 = turns(r"{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}") + (
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = turns("{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}") + prompt(
    "<|im_start|>assistant<|im_sep|>"
)
ZEPHYR = turns(r"{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}") + prompt(r"<|assistant|>\n")
#: an end of line behind every answer but the last
TULU = turns(
    r"{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role != 'assistant' %}{{ '\n' }}{% elif loop.last %}"
    r"{{ eos_token }}{% else %}{{ eos_token + '\n' }}{% endif %}"
) + prompt(r"<|assistant|>\n")
VICUNA = (
    SPLIT_SYSTEM + r"{{ (system or 'A chat between a curious user and an assistant.') + ' ' }}{% for m in chat %}"
    r"{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    r"{% endif %}{% endfor %}" + prompt("ASSISTANT:")
)  # fmt: skip
ALPACA = turns(
    r"{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
    r"{{ '### Instruction:\n' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
    r"{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}"
) + prompt(r"### Response:\n")
COMMAND_R = (
    "{{ bos_token }}" + SPLIT_SYSTEM + r"{% if system or documents %}"
    r"{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system }}{% if documents %}{{ '<results>' }}"
    r"{% for d in documents %}{{ '\nDocument: ' + loop.index0 | string + '\n' + d.title + '\n' + d.text }}{% endfor %}"
    r"{{ '\n</results>' }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for m in chat %}"
    "{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') }}"
    "{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    + prompt("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>")
)  # fmt: skip
#: channels: a thought is shown in the turn that ends the conversation alone, which ends in another token, too
HARMONY = (
    r"{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    r"{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    r"{{ '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary json<|message|>' }}"
    r"{{ c.arguments | tojson }}{{ '<|call|>' }}{% elif m.role == 'assistant' %}"
    r"{% if loop.last and m.reasoning_content %}"
    r"{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    r"{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    r"{% elif m.role == 'tool' %}{{ '<|start|>functions<|message|>' + m.content + '<|end|>' }}"
    r"{% else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) + '<|message|>' }}"
    r"{{ m.content + '<|end|>' }}{% endif %}{% endfor %}" + prompt("<|start|>assistant")
)
GRANITE = (
    SPLIT_SYSTEM + r"{{ '<|start_of_role|>system<|end_of_role|>' + (system or 'You are Granite.') }}"
    r"{{ '<|end_of_text|>\n' }}{% for d in documents or [] %}{{ '<|start_of_role|>document<|end_of_role|>' + d.text }}"
    r"{{ '<|end_of_text|>\n' }}{% endfor %}{% for m in chat %}"
    r"{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.tool_calls %}{{ '<|tool_call|>[' }}"
    r"{% for c in m.tool_calls %}{{ c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}"
    r"{% else %}{{ m.content }}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    + prompt("<|start_of_role|>assistant<|end_of_role|>")
)  # fmt: skip
#: plain text: what separates two turns is written before the second
FALCON = turns(
    r"{{ '\n' if not loop.first }}{{ 'System: ' if m.role == 'system' else 'User: ' if m.role == 'user' "
    r"else 'Falcon: ' }}{{ m.content }}"
) + prompt(r"\nFalcon:")
OPENCHAT = (
    "{{ bos_token }}" + turns("{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}")
    + prompt("GPT4 Correct Assistant:")
)  # fmt: skip
#: a turn ends where the next one's role begins: nothing is written behind an answer
GLM4 = r"{{ '[gMASK]<sop>' }}" + turns(r"{{ '<|' + m.role + '|>\n' + m.content }}") + prompt(r"<|assistant|>\n")
MARKED = (
    turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        r"{{ m.content + '<|im_end|>' }}"
        r"{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    )
    + CHATML_PROMPT
)
MARKED_LINE_END = MARKED.replace(r"+ '<|im_end|>' }}{% endgeneration", r"+ '<|im_end|>\n' }}{% endgeneration").replace(
    r"{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}", r"{{ m.content + '<|im_end|>\n' }}{% endif %}"
)
MARKED_EOS_OUTSIDE = (
    turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        r"{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    )
    + CHATML_PROMPT
)
MARKED_HEADER = (
    turns(
        r"{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}"
        r"{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        r"{% endif %}"
    )
    + CHATML_PROMPT
)
LINES = turns(r"{{ m.role + ': ' + m.content + '<|im_end|>\n' }}")
TRIMMED = turns(r"{{ '<|' + m.role + '|> ' + m.content | trim + ' \n\n' }}") + prompt("<|assistant|> ")
CLOSED_BETWEEN = turns(
    "{% if m.role != 'assistant' %}{{ '<|user|>' + m.content }}{% else %}{{ '<|bot|>' + m.content }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endif %}"
) + prompt("<|bot|>")
KNOWN_ROLES = (
    turns(
        r"{% if m.role == 'system' %}{{ '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}"
        r"{% elif m.role == 'user' %}"
        r"{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
        r"{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}%s{% endif %}"
    )
    + CHATML_PROMPT
)
DEFAULT_SYSTEM = (
    (
        r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        r"{% endif %}"
    )
    + CHATML
    + CHATML_PROMPT
)
R1 = ("<｜User｜>", "<｜Assistant｜>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
THINK = ("<think>", "</think>")

TEMPLATES = {
    "chatml": Template(CHATML + CHATML_PROMPT, "<|im_end|>", special=IM),
    "chatml_default_system": Template(DEFAULT_SYSTEM, "<|im_end|>", special=IM),
    "chatml_other_eos": Template(CHATML + CHATML_PROMPT, "<|endoftext|>", special=(*IM, "<|im_end|>")),
    # an end of turn that is no token at all
    "chatml_as_text": Template(CHATML + CHATML_PROMPT, "</s>", "<s>"),
    "hermes": Template(HERMES, "<|im_end|>", special=IM, added=("<tool_call>", "</tool_call>")),
    "qwen3": Template(QWEN3, "<|im_end|>", special=IM, added=THINK),
    "qwq": Template(QWQ, "<|im_end|>", special=IM),
    "empty_thought": Template(EMPTY_THOUGHT, "<|im_end|>", special=IM),
    "empty_thought_tokens": Template(EMPTY_THOUGHT, "<|im_end|>", special=IM, added=THINK),
    "thoughts_kept": Template(THOUGHTS_KEPT, "<|im_end|>", special=IM),
    "deepseek_r1": Template(DEEPSEEK_R1, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", R1, THINK),
    "deepseek_v3": Template(DEEPSEEK_V3, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", R1),
    "deepseek_v2": Template(DEEPSEEK_V2, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "llama2": Template(LLAMA2, "</s>", "<s>", prompt="never"),
    "llama3": Template(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", LLAMA3_SPECIAL),
    "llama31": Template(LLAMA31, "<|eot_id|>", "<|begin_of_text|>", LLAMA3_SPECIAL),
    "llama32_python": Template(LLAMA32_PYTHON, "<|eot_id|>", "<|begin_of_text|>", (*LLAMA3_SPECIAL, "<|eom_id|>")),
    "mistral_v1": Template(MISTRAL_V1, "</s>", "<s>", prompt="never"),
    "mistral_raises": Template(MISTRAL_RAISES, "</s>", "<s>", ("[INST]", "[/INST]"), prompt="never"),
    "mistral_v3": Template(MISTRAL_V3, "</s>", "<s>", MISTRAL_SPECIAL, prompt="never"),
    "gemma": Template(GEMMA, "<end_of_turn>", "<bos>", ("<start_of_turn>",)),
    "gemma_other_eos": Template(GEMMA, "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma2_folded": Template(GEMMA2_FOLDED, "<end_of_turn>", "<bos>", ("<start_of_turn>",)),
    # which writes EOS behind the whole conversation
    "phi3": Template(PHI3, "<|endoftext|>", special=(*ROLES, "<|end|>")),
    "phi4": Template(PHI4, "<|im_end|>", special=(*IM, "<|im_sep|>")),
    "zephyr": Template(ZEPHYR, "</s>", "<s>"),
    "tulu": Template(TULU, "<|endoftext|>"),
    "vicuna": Template(VICUNA, "</s>", "<s>"),
    "alpaca": Template(ALPACA, "</s>", "<s>"),
    "command_r": Template(COMMAND_R, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", COHERE),
    "harmony": Template(
        HARMONY, "<|return|>", special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")
    ),
    "granite": Template(GRANITE, "<|end_of_text|>", special=("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")),
    "falcon": Template(FALCON, "<|endoftext|>"),
    "openchat": Template(OPENCHAT, "<|end_of_turn|>", "<s>"),
    "glm4": Template(GLM4, "<|endoftext|>", special=("[gMASK]", "<sop>", *ROLES)),
    "marked": Template(MARKED, "<|im_end|>", special=IM),
    "marked_line_end": Template(MARKED_LINE_END, "<|im_end|>", special=IM),
    "marked_eos_outside": Template(MARKED_EOS_OUTSIDE, "<|im_end|>", special=IM),
    "marked_header": Template(MARKED_HEADER, "<|im_end|>", special=IM),
    "no_prompt": Template(CHATML, "<|im_end|>", special=IM, prompt="never"),
    "no_prompt_other_eos": Template(CHATML, "<|endoftext|>", special=(*IM, "<|im_end|>"), prompt="never"),
    "always_prompt": Template(
        CHATML + r"{{ '<|im_start|>assistant\n' }}", "<|im_end|>", special=IM, prompt="always"
    ),
    "always_prompt_other_eos": Template(
        CHATML + r"{{ '<|im_start|>assistant\n' }}", "<|endoftext|>", special=(*IM, "<|im_end|>"), prompt="always"
    ),
    "prompt_ends_in_space": Template(LINES + prompt("assistant: "), "<|endoftext|>", special=("<|im_end|>",)),
    "trimmed": Template(TRIMMED, "</s>", special=ROLES),
    "closed_between": Template(CLOSED_BETWEEN, "</s>", special=("<|user|>", "<|bot|>")),
    "skips_unknown_roles": Template(KNOWN_ROLES.replace("%s", ""), "<|im_end|>", special=IM),
    "raises_on_unknown_roles": Template(
        KNOWN_ROLES.replace("%s", "{% else %}{{ raise_exception('unknown role ' + m.role) }}"),
        "<|im_end|>",
        special=IM,
    ),
}  # fmt: skip
