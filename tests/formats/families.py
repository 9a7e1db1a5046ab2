"""Chat templates of public model families, each on a tiny tokenizer with the family's special tokens.

The templates are written here from the families' public rules, short, for the conversations that the kit knows
(strings only, no default system message). Sources, to compare with: the ``chat_template`` of each model; copies in
``trl/chat_templates`` (Apache-2.0) and llama.cpp ``models/templates``; vLLM ``examples/tool_chat_template_*.jinja``;
for Mistral's ``[ARGS]`` form the encoders of ``mistral-common`` (Apache-2.0); for the markers of DeepSeek and Kimi the
parsers of vLLM and SGLang too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_env.formats.hermes import HermesFormat

_SECTION = (HermesFormat.tool_section or "").replace("{{", "{").replace("}}", "}").split("\n{schemas}\n")
_CHATML_OPENING = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    f"{{{{- {_SECTION[0]!r} }}}}{{%- for tool in tools %}}{{{{- '\\n' }}}}{{{{- tool | tojson }}}}{{%- endfor %}}"
    f"{{{{- {chr(10) + _SECTION[1]!r} }}}}{{{{- '<|im_end|>\\n' }}}}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
)
_CHATML_CALLS = (
    "{%- for call in message.tool_calls or [] %}"
    "{%- if not loop.first or content %}{{- '\\n' }}{%- endif %}"
    """{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
)
_CHATML_RESULTS = (
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
)
_CHATML_USER = (
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
)
QWEN25 = (
    f"{_CHATML_OPENING}{{%- for message in messages %}}{_CHATML_USER}"
    f"{{{{- '<|im_start|>assistant\\n' + content }}}}{_CHATML_CALLS}{_CHATML_RESULTS}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Thinking is kept after the last question that a person asked, an empty block is written into the last turn, and
# the thinking before that question is dropped.
_QWEN3_TURNS = (
    f"{_CHATML_OPENING}"
    "{%- set ns = namespace(question=messages|length) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.question = loop.index0 %}{%- endif %}{%- endfor %}"
    f"{{%- for message in messages %}}{_CHATML_USER}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.question and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}{{- content }}"
    f"{_CHATML_CALLS}{_CHATML_RESULTS}"
)
QWEN3 = (
    _QWEN3_TURNS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN3_THINKING = (
    _QWEN3_TURNS.replace("(loop.last or thought)", "(loop.last or thought or true)")
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- set ns = namespace(start=0, system='') %}"
    "{%- if messages[0].role == 'system' %}{%- set ns.start = 1 %}{%- set ns.system = messages[0].content | trim %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}"
    "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + ns.system + '<|eot_id|>' }}"
    "{%- for message in messages[ns.start:] %}"
    "{%- if message.tool_calls %}{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('one call in a turn') }}{%- endif %}{%- set call = message.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    """{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}"""
    "{%- elif message.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{- message.content | tojson }}{{- '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{%- if tools and loop.first %}"
    "{{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments"
    ' that best answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters":'
    " dictionary of argument name and its value}.Do not use variables.\\n\\n' }}"
    "{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}{%- endif %}"
    "{{- message.content | trim }}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
PYTHONIC = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{- {'output': message.content} | tojson }}{{- '<|eot_id|>' }}"
    "{%- elif message.tool_calls %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n[' }}"
    "{%- for call in message.tool_calls %}{{- call.function.name + '(' }}"
    "{%- for key, value in call.function.arguments.items() %}{{- key + '=' }}{{- value | tojson }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ')' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{%- if loop.first and tools %}{{- (tools | tojson) + '\\n\\n' }}{%- endif %}"
    "{{- (message.content | trim) + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def _mistral(space: str, calls: str, result: str) -> str:
    """``space`` stands after markup in the tokenizers that put one there. The last question is told of the tools."""
    return (
        "{{- bos_token }}{%- set ns = namespace(system='', question=0) %}{%- for message in messages %}"
        "{%- if message.role == 'user' %}{%- set ns.question = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'system' %}{%- set ns.system = message.content + '\\n\\n' %}"
        "{%- elif message.role == 'user' %}{%- if tools and loop.index0 == ns.question %}"
        f"{{{{- '[AVAILABLE_TOOLS]{space}' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}}}{{%- endif %}}"
        f"{{{{- '[INST]{space}' + ns.system + message.content + '[/INST]' }}}}{{%- set ns.system = '' %}}"
        f"{{%- elif message.tool_calls %}}{calls}{{{{- eos_token }}}}"
        f"{{%- elif message.role == 'assistant' %}}{{{{- '{space}' + message.content + eos_token }}}}"
        f"{{%- else %}}{{{{- '[TOOL_RESULTS]{space}' }}}}{result}{{{{- '[/TOOL_RESULTS]' }}}}"
        "{%- endif %}{%- endfor %}"
    )


def _mistral_array(space: str) -> str:
    calls = (
        f"{{{{- '[TOOL_CALLS]{space}[' }}}}{{%- for call in message.tool_calls %}}"
        "{%- if call.id | length != 9 %}{{- raise_exception('an id has 9 characters') }}{%- endif %}"
        """{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}"""
        "{{- ']' if loop.last else ', ' }}{%- endfor %}"
    )
    result = """{{- '{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}"""
    return _mistral(space, calls, result)


MISTRAL_V3 = _mistral_array(" ")
MISTRAL_NEMO = _mistral_array("")
MISTRAL_NAMED = _mistral(
    "",
    "{%- for call in message.tool_calls %}"
    "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}{%- endfor %}",
    "{{- message.content }}",
)
GEMMA3 = (
    "{{- bos_token }}{%- set ns = namespace(prefix='') %}{%- for message in messages %}"
    "{%- if message.role == 'system' %}{%- set ns.prefix = message.content + '\\n\\n' %}"
    "{%- else %}{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' + ns.prefix }}"
    "{%- set ns.prefix = '' %}{{- (message.content | trim) + '<end_of_turn>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)


def _deepseek(opening: str, turn: str, call: str, between: str, results: tuple[str, str], prompt: str) -> str:
    """No description of tools; arguments come as JSON text. ``ns.after`` is the role of the message before."""
    return (
        "{{- bos_token }}{%- set ns = namespace(after='') %}"
        "{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}{%- endif %}"
        "{%- endfor %}"
        "{%- for message in messages %}"
        f"{{%- if message.role == 'user' %}}{{{{- '<｜User｜>' + message.content + '{opening}' }}}}"
        f"{{%- elif message.role == 'tool' %}}{{{{- {results[0]} }}}}"
        "{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}"
        f"{{%- elif message.role == 'assistant' %}}{{%- set content = message.content %}}{turn}{{{{- content }}}}"
        "{%- for call in message.tool_calls or [] %}"
        f"{{{{- '<｜tool▁calls▁begin｜>' if loop.first else '{between}' }}}}"
        f"{{{{- '<｜tool▁call▁begin｜>' + {call} + '<｜tool▁call▁end｜>' }}}}"
        "{{- '<｜tool▁calls▁end｜>' if loop.last }}{%- endfor %}{{- '<｜end▁of▁sentence｜>' }}"
        "{%- endif %}{%- set ns.after = message.role %}{%- endfor %}"
        f"{{%- if ns.after == 'tool' %}}{{{{- '{results[1]}' }}}}{{%- endif %}}{prompt}"
    )


_DEEPSEEK_THINKING_DROPPED = "{%- set content = content.split('</think>')[-1] %}"
_DEEPSEEK_FENCED = (
    "call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```'"
)
_DEEPSEEK_OUTPUTS = ("'\\n' if ns.after == 'tool' else '<｜tool▁outputs▁begin｜>'", "<｜tool▁outputs▁end｜>")
_DEEPSEEK_OUTPUTS_END = "{%- if ns.after == 'tool' %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}"
DEEPSEEK_V3 = _deepseek("<｜Assistant｜>", _DEEPSEEK_OUTPUTS_END, _DEEPSEEK_FENCED, "\\n", _DEEPSEEK_OUTPUTS, "")
DEEPSEEK_R1 = _deepseek(
    "<｜Assistant｜>",
    _DEEPSEEK_THINKING_DROPPED + _DEEPSEEK_OUTPUTS_END,
    _DEEPSEEK_FENCED,
    "\\n",
    _DEEPSEEK_OUTPUTS,
    "",
)
DEEPSEEK_V31 = _deepseek(
    "",
    "{%- if ns.after == 'user' %}{{- '<｜Assistant｜></think>' }}{%- endif %}" + _DEEPSEEK_THINKING_DROPPED,
    "call.function.name + '<｜tool▁sep｜>' + call.function.arguments",
    "",
    ("''", ""),
    "{%- if add_generation_prompt and ns.after == 'user' %}{{- '<｜Assistant｜></think>' }}{%- endif %}",
)
KIMI_K2 = (
    "{%- if tools %}{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_user|>' if message.role == 'user' else '<|im_assistant|>' if message.role == 'assistant'"
    " else '<|im_system|>' }}{{- (message.name or message.role) + '<|im_middle|>' }}"
    "{%- if message.role == 'tool' %}{{- '## Return of ' + message.tool_call_id + '\\n' }}{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<|tool_calls_section_begin|>' if loop.first }}"
    "{{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}"
    "{{- call.function.arguments | tojson }}{{- '<|tool_call_end|>' }}"
    "{{- '<|tool_calls_section_end|>' if loop.last }}{%- endfor %}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and the tokenizer it belongs on."""

    template: str
    format: str
    specials: tuple[str, ...]
    end: str
    kind: str = "byte-level"
    tags: tuple[str, ...] = ()


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[ARGS]",
)  # fmt: skip
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    *(f"<｜tool▁{what}▁{edge}｜>" for what in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    "<｜tool▁sep｜>",
)  # fmt: skip
_KIMI = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)  # fmt: skip
FAMILIES = {
    "Qwen 2.5": Family(QWEN25, "hermes", _CHATML, "<|im_end|>", tags=_TAGS[:4]),
    "Qwen 3": Family(QWEN3, "hermes", _CHATML, "<|im_end|>", tags=_TAGS),
    "Qwen 3, not thinking": Family(
        "{%- set enable_thinking = false %}" + QWEN3, "hermes", _CHATML, "<|im_end|>", tags=_TAGS
    ),
    "Qwen 3 Thinking": Family(QWEN3_THINKING, "hermes", _CHATML, "<|im_end|>", tags=_TAGS),
    "Llama 3": Family(LLAMA3, "llama", _LLAMA, "<|eot_id|>"),
    "Llama 3, pythonic": Family(PYTHONIC, "pythonic", _LLAMA, "<|eot_id|>"),
    "Mistral 0.3": Family(MISTRAL_V3, "mistral", _MISTRAL, "</s>", "space before the text"),
    "Mistral Nemo": Family(MISTRAL_NEMO, "mistral", _MISTRAL, "</s>"),
    "Mistral 2025": Family(MISTRAL_NAMED, "mistral", _MISTRAL, "</s>"),
    "Gemma 3": Family(GEMMA3, "tool_code", _GEMMA, "<end_of_turn>", "no space", ("\n\n", "\n\n\n")),
    "DeepSeek V3": Family(DEEPSEEK_V3, "deepseek", _DEEPSEEK, "<｜end▁of▁sentence｜>", tags=_TAGS[4:]),
    "DeepSeek R1": Family(DEEPSEEK_R1, "deepseek", _DEEPSEEK, "<｜end▁of▁sentence｜>", tags=_TAGS[4:]),
    "DeepSeek V3.1": Family(DEEPSEEK_V31, "deepseek", _DEEPSEEK, "<｜end▁of▁sentence｜>", tags=_TAGS[4:]),
    "Kimi K2": Family(KIMI_K2, "kimi", _KIMI, "<|im_end|>"),
    "Llama 2 tokenizer": Family(QWEN25, "hermes", _CHATML, "<|im_end|>", "space before every text"),
}


@cache
def family_tokenizer(name: str) -> Any:
    """The family's template on a tiny tokenizer of its kind."""
    family = FAMILIES[name]
    return make_tokenizer(family.kind, family.template, family.specials, family.end, family.tags)


def described(chat: Any, messages: list[Any], schemas: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Messages and tools as the template gets them."""
    if chat._template.describes_tools:
        return messages, list(schemas)
    return chat.describe_tools(messages, schemas), []


def make_tokenizer(kind: str, template: str, specials: tuple[str, ...], end: str, tags: tuple[str, ...] = ()) -> Any:
    """A tokenizer of a few hundred tokens that can write any text."""
    backend = _byte_level() if kind == "byte-level" else _byte_fallback(kind)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in tags])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=specials[0], eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), (">", "Ċ"), ("Ġ", "4"), ("Ċ", "<")]
    vocab = {char: index for index, char in enumerate([*alphabet, *(left + right for left, right in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_fallback(kind: str) -> Tokenizer:
    """SentencePiece as Hugging Face writes it: Gemma ("no space"), Mistral 0.3 and Llama 2 have these parts."""
    merges = [("▁", "t"), ("▁t", "h"), ("\n", "\n"), (">", "\n"), ("▁", "▁"), ("▁", "4")]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [chr(code) for code in [9, 10, *range(33, 127)]]
    pieces += ["▁", "é", *(left + right for left, right in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(["<unk>", *pieces]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "space before the text":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "space before every text":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
