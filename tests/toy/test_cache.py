"""What was made once is taken from the cache: whole, or not at all."""

from pathlib import Path

import pytest

from training.toy.cache import SUMS, cache_folder, digest_of, kept_or_made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


class Maker:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, out: Path) -> None:
        self.asked += 1
        (out / "clip").mkdir(parents=True, exist_ok=True)
        (out / "clip" / "weights").write_bytes(b"1")
        (out / "note").write_text(str(self.asked))


def test_it_is_made_once_and_taken_into_every_other_folder(tmp_path: Path, cache: Path) -> None:
    make = Maker()
    for name in ("one", "two", "three"):
        kept_or_made(tmp_path / name, "digest", make)
        assert (tmp_path / name / "clip" / "weights").read_bytes() == b"1"
    assert make.asked == 1
    assert [path.name for path in cache.iterdir()] == ["digest"]  # nothing half made beside it
    kept_or_made(tmp_path / "other", "another digest", make)
    assert make.asked == 2


@pytest.mark.parametrize("damage", ["another byte", "a file less", "a file more", "no sums", "sums are no JSON"])
def test_what_is_damaged_is_said_and_made_anew(
    tmp_path: Path, cache: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make = Maker()
    kept_or_made(tmp_path / "one", "digest", make)
    files = cache / "digest" / "files"
    if damage == "another byte":
        (files / "clip" / "weights").write_bytes(b"2")
    elif damage == "a file less":
        (files / "note").unlink()
    elif damage == "a file more":
        (files / "more").touch()
    elif damage == "no sums":
        (cache / "digest" / SUMS).unlink()
    else:
        (cache / "digest" / SUMS).write_text("{")
    kept_or_made(tmp_path / "two", "digest", make)
    assert (tmp_path / "two" / "note").read_text() == "2"
    assert "is damaged" in capfd.readouterr().err
    kept_or_made(tmp_path / "three", "digest", make)
    assert make.asked == 2


def test_a_failed_making_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    def fails(out: Path) -> None:
        Maker()(out)
        raise ValueError("half made")

    with pytest.raises(ValueError, match="half made"):
        kept_or_made(tmp_path / "one", "digest", fails)
    assert not cache.exists()


def test_where_nothing_can_be_kept_the_making_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    kept_or_made(tmp_path / "one", "digest", Maker())
    assert (tmp_path / "one" / "clip" / "weights").exists()
    assert "not kept for the next time" in capfd.readouterr().err


def test_the_digest_follows_names_bytes_and_words_not_folders(tmp_path: Path) -> None:
    for folder, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data").write_text(text)
    a, b, c = (digest_of([tmp_path / folder / "data"], "seed 0") for folder in "abc")
    assert a == b
    assert len({a, c, digest_of([tmp_path / "a" / "data"], "seed 1")}) == 3
