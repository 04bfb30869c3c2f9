"""Minimal chat templates for what the templates of real families turned out to do, one habit each."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates import CHATML, CHATML_PROMPT, IM, SPLIT_SYSTEM, prompt, turns
from tests.support.tokenizers_zoo import byte_level

#: DeepSeek: the arguments are put into the text as they are, and a content that is not null is an answer of its own
TEXT_ARGUMENTS = (
    turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
        r"{{ '<call>' + c.function.name + '\n' + c.function.arguments + '</call>' }}{% endfor %}"
        r"{% if m.tool_calls %}{{ '<|im_end|>\n' }}{% if m.content is not none %}"
        r"{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        r"{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    )
    + CHATML_PROMPT
)
#: older templates tell a call from an answer by its content being null
NULL_IS_A_CALL = (
    turns(
        r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is none %}{{ '<call>' + m.tool_calls[0].function.name }}"
        r"{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    )
    + CHATML_PROMPT
)
#: Kimi-K2, Granite 3: the tools are listed, and calls are not written
TOOLS_ALONE = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML + CHATML_PROMPT
#: Granite 3: the generation prompt stands in the loop, behind a question alone
PROMPT_IN_THE_LOOP = turns(
    r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    r"{% if loop.last and m.role == 'user' and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Qwen3.5: a conversation without a question is refused
WANTS_A_QUESTION = (
    r"{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    r"{{ raise_exception('No user query found in messages.') }}{% endif %}" + CHATML + CHATML_PROMPT
)
#: Kimi-K2: the system message that is there by default is written with the first message
SYSTEM_IN_THE_LOOP = (
    turns(
        r"{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nhe said<|im_end|>\n' }}{% endif %}"
        r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    )
    + CHATML_PROMPT
)
#: Qwen3.8: a thought is written from its own field alone; in its absence an empty one is
THOUGHTS_APART = turns(
    r"{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    r"{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
) + prompt(r"<|im_start|>assistant\n<think>\n")
#: gpt-oss: the thought before a call is cut as soon as an answer stands behind it; answers end otherwise than calls,
#: and the last one otherwise than those before
CALLS_WITH_THOUGHTS = (
    "{% set answers = messages | selectattr('role', 'equalto', 'assistant') | rejectattr('tool_calls') | list %}"
    r"{% for m in messages %}{% if m.tool_calls %}{% if not answers and m.reasoning_content %}"
    r"{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    r"{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}"
    r"{{ m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}{% elif m.role == 'assistant' %}"
    r"{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    r"{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    + prompt("<|start|>assistant")
)
#: Hermes-3: what stands behind a tool's result depends on whether a message follows it
RESULT_ENDS_OTHERWISE = (
    SPLIT_SYSTEM + r"{% for m in chat %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    r"{{ '<call>' + m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}"
    r"{% else %}{{ m.content }}{% endif %}{{ '\n' if m.role == 'tool' and not loop.last }}{{ '<|im_end|>\n' }}"
    r"{% endfor %}" + CHATML_PROMPT
)  # fmt: skip
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")


def quirky(template: str) -> PreTrainedTokenizerFast:
    tokenizer = (
        byte_level("<|return|>", special=HARMONY) if "<|return|>" in template else byte_level("<|im_end|>", special=IM)
    )
    tokenizer.chat_template = template
    return tokenizer
