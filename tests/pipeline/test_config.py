"""Settings: a text is what was typed, `~` is the home folder, every mistake is one line that says where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from pipeline.config import ConfigError, Given, Settings, differences, load_config


class Inner(Settings):
    number: int = 1
    free: dict[str, Any] = Field(default={})


class Toy(Settings):
    """One field of each kind."""

    run: str = "runs/toy"
    revision: str | None = "main"
    files: str | tuple[str, ...] = ()
    size: int | Literal["auto"] = "auto"
    rate: float | None = 1.0
    flag: bool = False
    word: Literal["on", "off"] = "off"
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()


def read(tmp_path: Path, text: str, *overrides: str | Given) -> Toy:
    (tmp_path / "toy.yaml").write_text(text, encoding="utf-8")
    return load_config(Toy, tmp_path / "toy.yaml", overrides)


TEXTS = ["20241126_2230", "2024-11-26", "007", "12:30", "1e3", "no", "on", "null", "0x1f", ".inf", "true", "1_0", "="]


@pytest.mark.parametrize(
    "text", [*TEXTS, "runs/a #2", "runs/a: b", "@x", "a, b", "[draft]", "{a: 1}", "!!python/x", "*a"]
)
def test_a_text_on_the_command_line_is_what_was_typed(text: str) -> None:
    assert load_config(Toy, None, [f"run={text}"]).run == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_file_is_what_was_typed(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"run: {text}\nfiles: [{text}, b]\n").model_dump(include={"run", "files"}) == {
        "run": text,
        "files": (text, "b"),
    }


def test_what_is_no_text_is_read_as_yaml(tmp_path: Path) -> None:
    for values in (
        {"revision": "null", "files": "[1, a]", "size": "0x1f", "rate": "null", "flag": "yes", "word": "on"},
        {"revision": "null", "files": "[1, a]", "size": "31", "rate": "null", "flag": "true", "word": "'on'"},
    ):
        lines = "".join(f"{name}: {value}\n" for name, value in values.items())
        for toy in (read(tmp_path, lines), load_config(Toy, None, [f"{k}={v}" for k, v in values.items()])):
            assert (toy.revision, toy.files, toy.size, toy.rate) == (None, ("1", "a"), 31, None)
            assert (toy.flag, toy.word) == (True, "on")
    assert load_config(Toy, None, ["size=auto", "run='a b'", "revision=1234567"]).run == "a b"


def test_what_another_reader_will_understand_keeps_its_text(tmp_path: Path) -> None:
    toy = read(tmp_path, "inner: {free: {run: 007, seed: 7, lora: null, flag: true, list: [1_0, a]}}")
    assert toy.inner.free == {"run": "007", "seed": 7, "lora": None, "flag": True, "list": ["1_0", "a"]}


def test_a_group_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    file = "inner: {number: 2, free: {a: 1}}"
    assert read(tmp_path, file, "inner.number=3").inner == Inner(number=3, free={"a": 1})
    assert read(tmp_path, file, "inner={free: {b: 1}}", "inner.number=3").inner == Inner(number=3, free={"b": 1})
    assert read(tmp_path, file, Given("here", {"inner": {"number": 3}})).inner == Inner(number=3, free={"a": 1})


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read(tmp_path, "run: ~/a\nfiles: [~/b, c~d]\nrevision: '~'\n").model_dump(
        include={"run", "files", "revision"}
    ) == {"run": "/home/me/a", "files": ("/home/me/b", "c~d"), "revision": "/home/me"}
    assert load_config(Toy, None, ["run=~"]).run == "/home/me"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r"line \d+: more than 100,000 values, every alias counted"),
        (f"inner: {{free: {BOMB.partition(': ')[2].partition(chr(10))[0]}, number: *a}}", "found \\['x'"),
        ("a: &a [*a]", "line 1: an alias stands within"),
        ("inner: {<<: &b {<<: [*b]}}", "line 1: an alias stands within"),
        ("run: !!python/object/apply:os.system [ls]", r"line 1: the tag '.*python/object.*' means nothing"),
        ("run: !mine x", "the tag '!mine' means nothing"),
        ("run: " + "[" * 3000, "3,000 opening brackets"),
        ("run: " + "{a: " * 900, "nested too deeply"),
        ("run: " + "[" * 60 + "]" * 60, "nested too deeply, at most 50"),
        ("\n".join(" " * level + "a:" for level in range(60)), "nested too deeply, at most 50"),
        ("run: a\nrun: b", "line 1: run is given twice"),
        ("[a]: b", "line 1: a list or a group stands before a colon"),
        ("run: [", "not valid YAML"),
        ("run: \x07", "not valid YAML"),
        ("- a", "expected settings"),
        ("7", "holds 7; expected settings"),
        ("", "holds None; expected settings"),
        ('run: "a\\0b"', "run: a text holds characters"),
        ('run: "\\ud800"', "run: a text holds characters"),
        ("size: " + "9" * 5000, r"\.\.\. \(5,002 characters\)"),
        ("run: 2024-13-45\nsize: !!int abc", "size.*found 'abc'"),
    ],
)
def test_a_file_that_is_none_is_one_message(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        read(tmp_path, text)
    assert len(str(raised.value)) < 2000


def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_bytes(b"run: \xff")
    for path, said in (
        (tmp_path / "toy.yaml", "is not UTF-8 text"),
        (tmp_path / "gone.yaml", "does not exist"),
        (tmp_path, "does not exist"),
        (tmp_path / ("x" * 5000), r"characters\)' cannot be read: File name too long"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(Toy, path, [])


def test_an_error_says_where_the_value_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read(
            tmp_path,
            "size: many\nflag: perhaps\ninner: {number: x, nmber: 2}\nseveral: [{number: y}]",
            "flag=maybe",
            Given("arm 'a'", {"inner": {"number": "z"}}),
        )
    message = str(raised.value)
    file = f"from {tmp_path}/toy.yaml"
    for line in (
        f"(found 'many', {file})",
        "flag: Input should be a valid boolean, unable to interpret input (found 'maybe', from the command line)",
        "(found 'z', from arm 'a')",
        f"inner.nmber: unknown setting, {file}; did you mean 'number'?",
        f"several.0.number: Input should be a valid integer, unable to parse string as an integer (found 'y', {file})",
    ):
        assert line in message


def test_a_long_value_is_cut() -> None:
    for argument in ("size=" + "x" * 10**6, "x" * 10**6, f"{'x' * 10**6}=1", "run.a=" + "x" * 10**6):
        with pytest.raises(ConfigError) as raised:
            load_config(Toy, None, ["run=r", argument])
        assert len(str(raised.value)) < 2000


def test_what_differs_is_named_with_both_values() -> None:
    theirs, mine = {"seed": 0, "codec": "bf16", "old": 1}, {"seed": 3, "codec": "bf16", "new": None, "limit": 5}
    assert differences(theirs, mine) == ["seed: 0 there, 3 now", "limit: None there, 5 now"]
    assert differences(theirs, mine, "in the checkpoint")[0] == "seed: 0 in the checkpoint, 3 now"
