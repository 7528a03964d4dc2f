"""The page of `python training/chat.py MODEL --web`: an image, questions, one or two models' answers side by side."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from pipeline.encoders.decode import open_image
from training.answers.talk import Speaker, Talk
from training.model.markers import IMAGE

INTRODUCTION = """\
## An image in few tokens
Choose an image and ask about it. Every model gets the same image and the same question, one after the other, so that
none slows the others down."""
Known = tuple[str, list[Talk]]  # an image's path, and each model's conversation about it
_HOUR, _DAY = 3600, 86400  # s: how often uploads are looked through, and how old the oldest becomes
CSS = ".facts p {font-variant-numeric: tabular-nums; opacity: .75} footer {display: none !important}"


def serve(load: Callable[[], list[Speaker]], port: int) -> None:
    """Serve the page on this machine until Ctrl-C or a signal to end; what was uploaded goes with it.

    The models are loaded once gradio is known to be there.

    Raises:
        ValueError: if gradio is not installed. OSError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="compact-vision-uploads-", ignore_cleanup_errors=True) as uploads:
        # Read when gradio is imported: nothing is sent anywhere, and uploads have a folder of their own.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        try:
            import gradio as gr
            from starlette.middleware import Middleware
            from starlette.middleware.trustedhost import TrustedHostMiddleware
        except ImportError as error:
            raise ValueError(f"--web needs gradio: pip install 'compact-vision-tokens[web]' ({error})") from error
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the folder goes then too
        # A page of another site must not ask this one, neither by a name that it let point here nor in its own name.
        guards = [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]), Middleware(OwnOrigin)]
        # Fonts of the machine itself: gradio's own come from another server.
        page(load()).launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            footer_links=[],
            max_file_size="64mb",
            run_history=False,
            app_kwargs={"middleware": guards},
        )


class OwnOrigin:
    """ASGI middleware that refuses what a page of another origin than this server's sends (status 403)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a request on, or refuse it; a browser names the origin of every request of a page that can change."""
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        headers = Headers(raw=scope.get("headers", []))
        origin = headers.get("origin")
        handler = self.app
        if origin is not None and origin != f"http://{headers.get('host')}":
            handler = PlainTextResponse(f"a page of {origin[:200]} may not ask this server\n", status_code=403)
        await handler(scope, receive, send)


def page(speakers: list[Speaker]) -> Any:
    """The page as Gradio Blocks."""
    import gradio as gr

    with gr.Blocks(title="Compact vision tokens", analytics_enabled=False, delete_cache=(_HOUR, _DAY)) as blocks:
        gr.Markdown(INTRODUCTION)
        known = gr.State(("", []))
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image: Any = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
                # The file as it is: our own reader changes no pixel, and says what is wrong with one that is no image.
                image.preprocess = lambda chosen: chosen and chosen.path
                question = gr.Textbox(label="Question", placeholder="What is in this image?", elem_id="question")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    new = gr.Button("New conversation", elem_id="new")
            chats, facts = [], []
            for number, speaker in enumerate(speakers):
                with gr.Column(scale=3, min_width=320):
                    gr.HTML(f"<b>{escape(_short(speaker))}</b> - {speaker.tokens} per image")
                    chats.append(
                        gr.Chatbot(
                            show_label=False,
                            height=420,
                            elem_id=f"chat{number}",
                            buttons=[],
                            feedback_options=None,
                            render_markdown=False,
                        )
                    )
                    facts.append(gr.Markdown("", elem_classes="facts", elem_id=f"facts{number}"))
        outputs = [question, known, *chats, *facts]

        def answer(path: str | None, text: str, shown: list[Any], known: Known) -> Iterator[list[Any]]:
            yield from answers(speakers, path, text, known if shown else ("", []))

        asked: list[dict[str, Any]] = [
            event(answer, [image, question, chats[0], known], outputs, concurrency_limit=1, concurrency_id="models")
            for event in (ask.click, question.submit)
        ]
        # The browser clears by itself: an answer of the server could come after the next question was typed.
        empty = json.dumps([[] for _ in chats] + ["" for _ in facts])
        for event in (new.click, image.change, *(chat.clear for chat in chats)):
            event(None, None, [*chats, *facts], js=f"() => {empty}", cancels=asked)
        new.click(None, None, question, js="() => ''")
    return blocks


def _short(speaker: Speaker) -> str:
    """A folder's last two names, a Hub id as it is."""
    return "/".join(Path(speaker.name).parts[-2:])


def answers(speakers: list[Speaker], path: str | None, text: str, known: Known) -> Iterator[list[Any]]:
    """Each model's answer in turn, while it grows; another image than that of `known` begins new conversations.

    Every yield is what the page shows now: the question's box (emptied once, then left to who types), the
    conversations with their image's path, each model's messages, each model's figures.

    Raises:
        gradio.Error: if there is no image, or a question or an image that cannot be used.
    """
    import gradio as gr

    if path is None:
        raise gr.Error("Choose an image first.", duration=6, print_exception=False)
    try:
        talks = known[1] if known[0] == path else [Talk(speaker, open_image(Path(path))) for speaker in speakers]
        box: Any = ""
        facts = [""] * len(speakers)
        saying: list[str | None] = [None] * len(speakers)
        for number, talk in enumerate(talks):
            saying[number] = ""
            for piece in talk.ask(text):
                saying[number] = f"{saying[number]}{piece}"
                yield [box, (path, talks), *_shown(talks, text, saying), *facts]
                box = gr.skip()
            saying[number] = None
            facts[number] = talk.facts
            yield [box, (path, talks), *_shown(talks, text, saying), *facts]
    except (ValueError, OSError) as error:
        raise gr.Error(escape(str(error)), duration=10, print_exception=False) from error


def _shown(talks: list[Talk], text: str, saying: list[str | None]) -> list[list[dict[str, str]]]:
    """The conversations as Gradio's messages, a growing answer at the end of one that is answering.

    What was said is shown letter for letter: markup in it could ask another server for an image.
    """
    chats = []
    for talk, growing in zip(talks, saying, strict=True):
        said = [*talk.history, *([(text, growing)] if growing is not None else [])]
        chats.append(
            [
                {"role": role, "content": escape(words.removeprefix(f"{IMAGE}\n"), quote=False)}
                for question, answer in said
                for role, words in (("user", question), ("assistant", answer))
            ]
        )
    return chats
