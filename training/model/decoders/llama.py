"""Llama's architecture, tuned as Vicuna: the language model of LLaVA-1.5."""

from __future__ import annotations

from .base import Decoder

# Vicuna's template, LLaVA-1.5's `v1`: an image goes first in its message, and nothing follows an answer's </s>.
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system, turns = messages[0]['content'], messages[1:] -%}
    {%- if system is not string -%}
        {%- set system = system | map(attribute='text') | join('\n') -%}
    {%- endif -%}
{%- else -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- system + ' ' -}}
{%- for turn in turns -%}
    {%- if turn['content'] is string -%}
        {%- set text = turn['content'] -%}
    {%- else -%}
        {%- set images = turn['content'] | selectattr('type', 'equalto', 'image') | list -%}
        {%- set text = turn['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') -%}
        {%- if images -%}
            {%- set text = ('<image>' * (images | length) + '\n' + text.strip()).strip() -%}
        {%- endif -%}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- 'USER: ' + text + ' ' -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' + text + '</s>' -}}
    {%- else -%}
        {{- raise_exception("roles are user and assistant, and system for the first message; found " + turn['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

LLAMA = Decoder(template="v1", chat_template=CHAT_TEMPLATE)
