"""Chat: answers that stream, in a real terminal and in a real browser."""

import http.client
import itertools
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.encoders.decode import open_image
from training.answers.talk import Speaker, Talk
from training.chat import main
from training.text.templates import prompt_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "red square.png"
    image = Image.new("RGB", (200, 150), (230, 230, 230))
    image.paste((200, 30, 10), (40, 30, 110, 100))
    image.save(path)
    return path


@pytest.fixture
def talk(exported: Path, picture: Path) -> Talk:
    return Talk(Speaker.load(str(exported), max_new_tokens=6, device="cpu"), open_image(picture))


def generated(talk: Talk, prompt: str) -> str:
    speaker = talk.speaker
    inputs = speaker.processor(images=[talk.image], text=prompt, return_tensors="pt")
    tokens = speaker.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return speaker.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_what_streams_is_what_the_model_answers_turn_by_turn(talk: Talk) -> None:
    first = "".join(talk.ask("What is this?")).strip()
    assert first == generated(talk, prompt_for("<image>\nWhat is this?"))
    second = "".join(talk.ask(" Why? ")).strip()
    assert second == generated(talk, prompt_for("Why?", [("<image>\nWhat is this?", first)]))
    assert talk.history == [("<image>\nWhat is this?", first), ("Why?", second)]
    assert talk.first_token_s > 0
    assert talk.tokens_per_s > 0
    assert talk.facts.startswith("4 vision tokens of 16, first token after ")


def test_an_answer_that_is_stopped_ends_soon_and_is_remembered_as_far_as_it_came(talk: Talk) -> None:
    talk.speaker.max_new_tokens = 1500
    pieces = talk.ask("Tell me everything.")
    said = next(pieces)
    pieces.close()
    ((_, remembered),) = talk.history
    assert remembered == said.strip()
    assert "".join(talk.ask("Go on.")) is not None


def test_what_goes_wrong_while_answering_is_raised_where_the_answer_is_read(talk: Talk) -> None:
    talk.speaker.model.connector = torch.nn.Identity()  # something breaks
    with pytest.raises(AttributeError):
        list(talk.ask("What?"))


def test_questions_that_cannot_be_asked_are_refused(talk: Talk) -> None:
    for question in ("", "  ", "what is <image>?"):
        with pytest.raises(ValueError, match="some text without <image>"):
            list(talk.ask(question))
    with pytest.raises(ValueError, match=r"half a surrogate pair .*; write it in UTF-8"):  # what a shell hands on
        list(talk.ask("caf\udce9?"))
    talk.history = [("<image>\nx", "word " * 3000)]
    with pytest.raises(ValueError, match="longer than the model can read"):
        list(talk.ask("And now?"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give an IMAGE, or --web"),
        (["image.png", "--web"], "the image is chosen in the browser"),
        (["image.png", "--against", "other"], "--against goes with --web"),
        (["/nowhere.png"], "error: .*No such file"),
        (["BROKEN"], "error: .*broken.png: unreadable image"),
        (["BROKEN", "--temperature", "nan"], "at least 0 and finite; found 512 and nan"),
        (["BROKEN", "--temperature", "inf"], "at least 0 and finite; found 512 and inf"),
    ],
)
def test_mistakes_on_the_command_line_are_said(
    arguments: list[str], said: str, exported: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    given = [str(tmp_path / "broken.png") if word == "BROKEN" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["chat.py", str(exported), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert re.search(said, f"{ended.value}{capsys.readouterr().err}")


def test_the_page_without_gradio_says_what_to_install(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["chat.py", str(exported), "--web", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"error: --web needs gradio: pip install 'compact-vision-tokens\[web\]'"):
        main()


def test_on_the_page_answers_grow_one_model_after_the_other(talk: Talk, picture: Path) -> None:
    gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'compact-vision-tokens[web]'")
    from training.answers.web import answers

    talk.speaker.max_new_tokens = 20
    speakers = [talk.speaker, talk.speaker]
    shown = list(answers(speakers, str(picture), "What is this?", ("", [])))
    expected = "".join(talk.ask("What is this?")).strip()
    first, second = ([state[2 + side][-1:] for state in shown] for side in (0, 1))
    grown = [state[0]["content"] for state in first if state]
    assert grown[-1] == expected
    assert len({len(text) for text in grown}) > 2
    assert all(long.startswith(short.strip()) for short, long in itertools.pairwise(grown))
    begun = next(number for number, state in enumerate(second) if state)
    assert first[begun][0]["content"] == expected
    assert shown[begun][4].startswith("4 vision tokens of 16, first token after")
    assert second[-1][0]["content"] == expected
    with pytest.raises(gr.Error, match="Choose an image"):
        list(answers(speakers, None, "What?", ("", [])))


def test_on_the_page_another_image_begins_another_talk_and_the_question_is_emptied_once(
    talk: Talk, picture: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'compact-vision-tokens[web]'")
    from training.answers.web import answers

    first = list(answers([talk.speaker], str(picture), "What is this?", ("", [])))
    assert first[0][0] == ""
    assert "" not in [state[0] for state in first[1:]]
    (again,) = list(answers([talk.speaker], str(picture), "Why?", first[-1][1]))[-1][1][1]
    assert len(again.history) == 2
    other = tmp_path / "other.png"
    Image.new("RGB", (9, 9)).save(other)
    ends = list(answers([talk.speaker], str(other), "And this?", first[-1][1]))[-1]
    assert [question for question, _ in ends[1][1][0].history] == ["<image>\nAnd this?"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_the_image_that_was_chosen_on_the_page_reaches_the_model_as_it_is(
    mode: str, talk: Talk, tmp_path: Path
) -> None:
    gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'compact-vision-tokens[web]'")
    from training.answers.web import page as page_of

    path = tmp_path / ("photo.jpg" if mode in ("L", "CMYK") else "photo.png")
    Image.new(mode, (20, 10), 77).save(path)
    (chosen,) = [block for block in page_of([talk.speaker]).blocks.values() if isinstance(block, gr.Image)]
    assert chosen.preprocess(None) is None
    for file, content in ((path, path.read_bytes()), (tmp_path / "no image.png", b"text")):
        file.write_bytes(content)
        assert chosen.preprocess(chosen.data_model(path=str(file), orig_name=file.name)) == str(file)


def test_what_was_said_on_the_page_is_shown_letter_for_letter(talk: Talk, picture: Path, tmp_path: Path) -> None:
    gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'compact-vision-tokens[web]'")
    from training.answers.web import answers
    from training.answers.web import page as page_of

    markup, shown = "<img src=//elsewhere> & *b*", "&lt;img src=//elsewhere&gt; &amp; *b*"
    (messages,) = list(answers([talk.speaker], str(picture), markup, ("", [])))[-1][2:-1]
    assert messages[0] == {"role": "user", "content": shown}
    with pytest.raises(gr.Error, match=re.escape("without &lt;image&gt;; found &#x27;&lt;image&gt;")):
        list(answers([talk.speaker], str(picture), "<image>", ("", [])))
    (tmp_path / "no.png").write_bytes(b"text")
    with pytest.raises(gr.Error, match=r"no\.png: unreadable image"):
        list(answers([talk.speaker], str(tmp_path / "no.png"), "What?", ("", [])))
    talk.speaker.name = markup
    heads = [block.value for block in page_of([talk.speaker]).blocks.values() if isinstance(block, gr.HTML)]
    assert heads == ["<b>&lt;img src=/elsewhere&gt; &amp; *b*</b> - 4 vision tokens of 16 per image"]


class Terminal:
    """A program in a pseudo-terminal, typed at and read as a person would."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = b""

    def until(self, text: str) -> str:
        """What appears up to `text`."""
        while text.encode() not in self.seen:
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:  # the other side is closed
                break
        before, found, self.seen = self.seen.partition(text.encode())
        assert found or text == "", f"it ended with {before.decode()!r}"
        return (before + found).decode()

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_conversation_in_a_terminal(exported: Path, picture: Path, talk: Talk) -> None:
    terminal = Terminal(sys.executable, "training/chat.py", str(exported), str(picture), "--max-new-tokens", "6")
    try:
        assert "4 vision tokens of 16" in terminal.until("> ")
        answers = []
        for question in ("What is this?", "Why?"):
            terminal.type(question)
            answers.append(terminal.until("tokens/s)"))
            terminal.until("> ")
            expected = "".join(talk.ask(question)).strip()
            assert expected.split()[0] in answers[-1]
        terminal.type("/image /nowhere.png")
        assert "No such file" in terminal.until("> ")
        terminal.type("/image ~nobody-here/a.png")
        assert "'~nobody-here/a.png': Could not determine home" in terminal.until("> ")
        terminal.type("/image")
        assert "/image needs a PATH" in terminal.until("> ")
        terminal.type("/dance")
        assert "/dance is unknown; say /image PATH, /new or /quit" in terminal.until("> ")
        terminal.type("/quit")
        assert terminal.process.wait() == 0
    finally:
        terminal.close()


@pytest.fixture
def served(exported: Path, tmp_path: Path) -> Iterator[tuple[Terminal, int]]:
    """The page with the model against itself, and its port; temporary files go to `tmp_path`."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'compact-vision-tokens[web]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["training/chat.py", str(exported), "--web", "--against", str(exported), "--port", str(port)]
    options = ["--max-new-tokens", "8", "--device", "cpu"]
    server = Terminal("env", f"TMPDIR={tmp_path}", sys.executable, *command, *options)
    try:
        server.until(f"127.0.0.1:{port}")
        yield server, port
    finally:
        server.close()


@pytest.fixture
def page(served: tuple[Terminal, int], hang_s: int) -> Iterator[object]:
    """The page in Chromium; nothing outside this machine is asked for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the browser test needs chromium (apt-get install chromium)")
    with playwright.sync_playwright() as play:
        patience_ms = 1000 * hang_s / 2  # before the test is stopped: the browser's message says more
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=patience_ms
        )
        opened = browser.new_page(viewport={"width": 1280, "height": 800})
        opened.set_default_timeout(patience_ms)
        opened.foreign = []
        opened.on("request", lambda r: opened.foreign.append(r.url) if "127.0.0.1" not in r.url else None)
        opened.goto(f"http://127.0.0.1:{served[1]}")
        yield opened
        browser.close()


@pytest.mark.slow  # a server of its own
def test_the_page_refuses_other_hosts_and_origins_and_leaves_no_upload(
    served: tuple[Terminal, int], picture: Path, tmp_path: Path
) -> None:
    server, port = served

    def asked(path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    assert asked("/config")[0] == asked("/config", Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", ""):
        assert asked("/config", Host=host)[0] == 400, host
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n--x--\r\n'
    upload = {"path": "/gradio_api/upload", "body": form % picture.read_bytes()}
    sent = {"Content-Type": "multipart/form-data; boundary=x"}
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", f"https://127.0.0.1:{port}"):
        assert asked(**upload, **sent, Origin=origin)[0] == 403, origin
    assert not list(tmp_path.rglob("*.png"))
    status, answered = asked(**upload, **sent, Origin=f"http://127.0.0.1:{port}")
    assert status == 200
    (kept,) = json.loads(answered)
    assert Path(kept).is_relative_to(tmp_path)
    assert Path(kept).read_bytes() == picture.read_bytes()
    assert asked(f"/gradio_api/file={kept}")[0] == 200
    assert asked(f"/gradio_api/file={ROOT / 'README.md'}")[0] == 403
    server.process.terminate()
    assert server.process.wait() == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def letters(text: str) -> str:
    return re.sub(r"\W", "", text, flags=re.ASCII)


@pytest.mark.slow  # a browser
def test_a_conversation_in_a_browser(page, picture: Path, talk: Talk, tmp_path: Path) -> None:
    talk.speaker.max_new_tokens = 8
    page.get_by_text("4 vision tokens of 16").first.wait_for()
    question = page.locator("#question textarea")
    question.fill("What is this?")
    page.locator("#ask").click()
    page.get_by_text("Choose an image first.").wait_for()
    page.get_by_test_id("toast-body").wait_for(state="detached")
    page.locator("input[type=file]").first.set_input_files(str(picture))
    page.locator("img[src*='red']").first.wait_for()
    assert question.input_value() == "What is this?"  # typed before the image was chosen
    said = ""
    # The page may show an answer whole a moment before it is ready for the next click of the same button.
    for text, ask in (("What is this?", lambda: question.press("Enter")), ("Why?", page.locator("#ask").click)):
        question.fill(text)
        ask()
        said += letters(text) + letters("".join(talk.ask(text)))
        for side in (0, 1):
            page.wait_for_function(
                "([side, said]) => document.querySelector('[data-testid=toast-body]') ||"
                "document.querySelector(`#chat${side}`).innerText.replace(/\\W/g, '').includes(said)",
                arg=[side, said],
            )
            assert said in letters(page.locator(f"#chat{side}").inner_text()), page.locator("body").inner_text()
            page.locator(f"#facts{side}").get_by_text("first token after").wait_for()
    page.screenshot(path=os.environ.get("CHAT_SCREENSHOT", str(tmp_path / "chat.png")))
    question.fill("Forgotten")
    page.locator("#new").click()
    page.get_by_text("Why?").first.wait_for(state="detached")
    page.wait_for_function("document.querySelector('#question textarea').value === ''")
    assert not page.foreign
