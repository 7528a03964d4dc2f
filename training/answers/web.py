"""The page of `python training/chat.py MODEL --web`: an image, questions, one or two models' answers side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.encoders.decode import open_image
from training.answers.talk import Speaker, Talk
from training.model.markers import IMAGE

INTRODUCTION = """\
## An image in few tokens
Choose an image and ask about it. Every model gets the same image and the same question, one after the other, so that
none slows the others down."""
CSS = ".facts p {font-variant-numeric: tabular-nums; opacity: .75} footer {display: none !important}"


def serve(load: Callable[[], list[Speaker]], port: int) -> None:
    """Serve the page on this machine until Ctrl-C; the models are loaded once gradio is known to be there.

    Raises:
        ValueError: if gradio is not installed. OSError: if the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: nothing is sent anywhere
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"--web needs gradio: pip install 'compact-vision-tokens[web]' ({error})") from error
    # Fonts of the machine itself: gradio's own come from another server.
    page(load()).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        max_file_size="64mb",
    )


def page(speakers: list[Speaker]) -> Any:
    """The page as Gradio Blocks."""
    import gradio as gr

    with gr.Blocks(title="Compact vision tokens", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        talks = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
                question = gr.Textbox(label="Question", placeholder="What is in this image?", elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    new = gr.Button("New conversation", elem_id="new")
            chats, facts = [], []
            for number, speaker in enumerate(speakers):
                with gr.Column(scale=3, min_width=320):
                    gr.Markdown(f"**{_short(speaker)}** - {speaker.tokens} per image")
                    chats.append(
                        gr.Chatbot(
                            show_label=False, height=420, elem_id=f"chat{number}", buttons=[], feedback_options=None
                        )
                    )
                    facts.append(gr.Markdown("", elem_classes="facts", elem_id=f"facts{number}"))
        outputs = [question, talks, *chats, *facts]

        def answer(path: str | None, text: str, known: list[Talk]) -> Iterator[list[Any]]:
            yield from answers(speakers, path, text, known)

        def forget() -> list[Any]:
            return ["", [], *[[] for _ in speakers], *["" for _ in speakers]]

        for event in (ask.click, question.submit):
            event(answer, [image, question, talks], outputs, concurrency_limit=1, concurrency_id="models")
        for event in (new.click, image.change, *(chat.clear for chat in chats)):
            event(forget, None, outputs)
    return blocks


def _short(speaker: Speaker) -> str:
    """A folder's last two names, a Hub id as it is."""
    return "/".join(Path(speaker.name).parts[-2:])


def answers(speakers: list[Speaker], path: str | None, text: str, known: list[Talk]) -> Iterator[list[Any]]:
    """Each model's answer in turn, while it grows.

    Every yield is what the page shows now: the question's box, the conversations (`known` are those so far), each
    model's messages, each model's figures.

    Raises:
        gradio.Error: if there is no image, or a question or an image that cannot be used.
    """
    import gradio as gr

    if path is None:
        raise gr.Error("Choose an image first.", duration=6)
    try:
        talks = known or [Talk(speaker, open_image(Path(path))) for speaker in speakers]
        facts = [""] * len(speakers)
        saying: list[str | None] = [None] * len(speakers)
        for number, talk in enumerate(talks):
            saying[number] = ""
            for piece in talk.ask(text):
                saying[number] = f"{saying[number]}{piece}"
                yield ["", talks, *_shown(talks, text, saying), *facts]
            saying[number] = None
            facts[number] = talk.facts
            yield ["", talks, *_shown(talks, text, saying), *facts]
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), duration=10) from error


def _shown(talks: list[Talk], text: str, saying: list[str | None]) -> list[list[dict[str, str]]]:
    """The conversations as Gradio's messages; a model that is answering has its growing answer at the end."""
    chats = []
    for talk, growing in zip(talks, saying, strict=True):
        said = [*talk.history, *([(text, growing)] if growing is not None else [])]
        chats.append(
            [
                {"role": role, "content": words.removeprefix(f"{IMAGE}\n")}
                for question, answer in said
                for role, words in (("user", question), ("assistant", answer))
            ]
        )
    return chats
