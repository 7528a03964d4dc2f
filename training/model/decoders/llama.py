"""Llama's architecture, tuned as Vicuna: the language model of LLaVA-1.5."""

from __future__ import annotations

from .base import Decoder

# Vicuna's template, LLaVA-1.5's `v1`: an image goes first in its message, nothing follows an answer's </s>, an empty
# message leaves its role open. What the template has no words for is refused: nothing that was sent is dropped.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- raise_exception("the model knows no tools; leave them out") -}}
{%- endif -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system, turns = messages[0]['content'], messages[1:] -%}
    {%- if system is not string -%}
        {%- if system is not iterable or system | rejectattr('type', 'equalto', 'text') | list -%}
            {{- raise_exception("a system message is text; put the image into the user's first one") -}}
        {%- endif -%}
        {%- set system = system | map(attribute='text') | join('\n') -%}
    {%- endif -%}
{%- else -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- system + ' ' -}}
{%- for turn in turns -%}
    {%- set expected = ['user', 'assistant'][loop.index0 % 2] -%}
    {%- if turn['role'] != expected -%}
        {{- raise_exception("roles are user and assistant in turns, and system for the first message; found "
            ~ turn['role'] ~ ", expected " ~ expected) -}}
    {%- elif turn['tool_calls'] or turn['image'] or turn['images'] or turn['image_url'] -%}
        {{- raise_exception("a message has a role and a content; put its image into the content, "
            "leave out tool calls") -}}
    {%- endif -%}
    {%- set said = namespace(images=0, texts=[]) -%}
    {%- if turn['content'] is string -%}
        {%- set said.texts = [turn['content']] -%}
    {%- elif turn['content'] is not iterable -%}
        {{- raise_exception("a content is a text, or a list of parts; found " ~ turn['content']) -}}
    {%- else -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'image' and part['text'] is not defined -%}
                {%- set said.images = said.images + 1 -%}
            {%- elif part['type'] == 'text' and part['text'] is string
                and not (part['image'] or part['image_url'] or part['url'] or part['path'] or part['base64']) -%}
                {%- set said.texts = said.texts + [part['text']] -%}
            {%- else -%}
                {{- raise_exception("a part of a message is {'type': 'text', 'text': ...} or {'type': 'image', ...}; "
                    "found " ~ (part | string)[:80]) -}}
            {%- endif -%}
        {%- else -%}
            {{- raise_exception("a message of the " ~ turn['role'] ~ " has no content; write one, or leave it out") -}}
        {%- endfor -%}
    {%- endif -%}
    {%- set text = said.texts | join('\n') -%}
    {%- if said.images -%}
        {%- set text = ('<image>' * said.images + '\n' + text.strip()).strip() -%}
    {%- endif -%}
    {{- ['USER:', 'ASSISTANT:'][loop.index0 % 2] -}}
    {%- if text -%}
        {{- ' ' + text + [' ', '</s>'][loop.index0 % 2] -}}
    {%- endif -%}
    {%- if loop.last and add_generation_prompt and turn['role'] == 'assistant' -%}
        {{- raise_exception("the last message is an answer; end with a question, or set continue_final_message") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

LLAMA = Decoder(template="v1", chat_template=CHAT_TEMPLATE, sees_all_before=True)
