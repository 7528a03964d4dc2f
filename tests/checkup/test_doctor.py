"""Before a run: the doctor's lines on a good setting and on bad ones, alone and between ranks; what --check shows."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from transformers import LlamaConfig

from pipeline.config import load_config
from training import doctor
from training.checkup import machine
from training.checkup.examine import together
from training.checkup.machine import lacks_kernels, versions
from training.config import TrainConfig
from training.fit.finding import Finding


@pytest.fixture(scope="module")
def seen(store: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small store, as made by an encoder that is there: what stage 2 needs at its end."""
    from pipeline.encoder import describe_encoder

    copy = Path(shutil.copytree(store, tmp_path_factory.mktemp("seen") / "store"))
    spec = json.loads((copy / "store.json").read_text())
    spec["encoder"] |= {"id": str(clip_folder), "revision": describe_encoder(str(clip_folder), None).revision}
    (copy / "store.json").write_text(json.dumps(spec))
    return f"data.store={copy}"


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the doctor; gives its exit code and what it said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
        code = doctor.main()
        return code, capsys.readouterr().out

    return run


def lines(output: str, check: str) -> list[str]:
    return [line for line in output.splitlines() if line[6:].startswith(check)]


def test_every_example_is_looked_at_beforehand_where_asked(good: list[str], examine: Callable) -> None:
    assert not lines(examine(*good)[1], "examples")
    _, output = examine(*good, "--examples")
    assert lines(output, "examples")[0].startswith("ok    examples       all ")
    code, output = examine(*good, "--examples", "data.max_length=20")  # the template's own words fill it
    assert code == 1
    told = output[output.index("fail  examples") :].splitlines()
    assert re.search(r"(\d+) of \1 would be skipped, 0+#0 first \(data\.max_skipped is 0\.05; mend", told[0])
    assert " x its image lies beyond data.max_length 20: " in told[1]
    code, output = examine(*good, "--examples", "data.template=plain", "data.max_skipped=1")
    assert code == 0
    assert " x it has no image, but the plain template shows one" in output[output.index("warn  examples") :]


def test_a_good_configuration_has_no_failure(good: list[str], examine: Callable, tmp_path: Path) -> None:
    code, output = examine(*good)
    assert code == 0, output
    assert "0 warn, 0 fail" in output.splitlines()[-1]
    assert "8 examples / 1 rank(s) = 8 each, in 2 microbatch(es) of 4" in lines(output, "batch")[0]
    assert "columns block03" in lines(output, "store")[0]
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".trial-*"))


def test_what_is_held_out_is_counted_and_what_is_learned_from_too_is_said(
    good: list[str], store: Path, examine: Callable
) -> None:
    code, output = examine(*good, "data.validation.share=0.3")
    assert code == 0, output
    assert re.fullmatch(r"ok    held out +\d+ examples, \d+ images", lines(output, "held out")[0])
    code, output = examine(*good, f"data.validation.store={store}")
    assert code == 0, output
    assert re.match(r"warn .* of these images are learned from too: '", lines(output, "held out")[0])
    _, output = examine(*good, "data.validation={share: 0.3, questions: /no, images: /no}")
    assert "/no does not exist" in lines(output, "held out")[0]


def test_without_a_configuration_the_machine_is_looked_at(examine: Callable) -> None:
    code, output = examine()
    assert code == 0
    assert {line[6:20].strip() for line in output.splitlines()[:-1]} == {"versions", "gpus", "links", "shared memory"}


@pytest.mark.parametrize(
    ("settings", "check", "words"),
    [
        (["data.stor=x"], "configuration", "did you mean 'store'?"),
        (["data.store=/nowhere"], "store", "is not a feature store"),
        (["model.connector.blocks=[3,6]"], "model", "needs block06; there is only block03, cls23"),
        (["model.llm=/nowhere/llm"], "model", "/nowhere/llm"),
        (["model.connector_from=/nowhere"], "model", "/nowhere holds no connector.safetensors"),
        (["data.max_length=4096"], "model", "more than the 2048 positions"),
        (["--ranks", "3"], "batch", "8 is not divisible by 3 ranks"),
        (["global_batch_size=512"], "batch", "fewer than one global batch of 512; lower global_batch_size"),
        (["data.validation={store: /nowhere}"], "held out", "/nowhere is not a feature store"),
        (["run=/proc/nowhere/run"], "disk", "cannot write to /proc"),
        (["device=gpu"], "gpus", "or say device=cpu"),
    ],
)
def test_what_cannot_work_fails_with_what_to_do(
    good: list[str], examine: Callable, settings: list[str], check: str, words: str
) -> None:
    code, output = examine(*good, *settings)
    assert code == 1
    (failure,) = [line for line in output.splitlines() if line.startswith("fail")] or [output]
    assert failure[6:].startswith(check)
    assert words in output
    assert "Traceback" not in output


def test_a_model_that_no_memory_holds_fails(
    good: list[str], seen: str, examine: Callable, llm: Path, tmp_path: Path
) -> None:
    huge = LlamaConfig(hidden_size=4096, intermediate_size=2**20, num_hidden_layers=40, num_attention_heads=32)
    huge.save_pretrained(tmp_path / "huge")
    (tmp_path / "huge" / "tokenizer.model").write_bytes((llm / "tokenizer.model").read_bytes())
    code, output = examine(*good, f"model.llm={tmp_path / 'huge'}", "train=[connector,llm]", seen)
    assert code == 1
    assert lines(output, "memory")[0].startswith("fail")
    assert lines(output, "disk")[0].startswith("fail")
    assert "lower microbatch_size" in output


def test_text_teaches_a_connector_nothing_unless_the_llm_learns_or_images_come_with_it(
    good: list[str], store: Path, examine: Callable, make_store: Callable, tmp_path: Path
) -> None:
    texts = [make_store(tmp_path / name, [9, 4], text_every=1, first=first) for name, first in (("a", 0), ("b", 50))]
    several = "data.stores=[{{store: {}}}, {{store: {}}}]"
    for settings in ([f"data.store={texts[0]}"], ["data.store=null", several.format(*texts)]):
        code, output = examine(*good, *settings)
        assert code == 1
        assert "has no image to learn from, and the connector learns from nothing else" in lines(output, "batch")[0]
    code, output = examine(*good, "data.store=null", several.format(store, texts[1]))
    assert code == 0
    assert f"{texts[1]} is text only" in output


def test_a_damaged_store_fails(good: list[str], examine: Callable, make_store: Callable, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [9, 4])
    (store / "block03" / "00000.tar").write_bytes(b"")
    code, output = examine(*good, f"data.store={store}")
    assert code == 1
    assert "block03 of 000000000 is cut off; run pipeline/verify_shards.py" in output


def test_the_bucket_of_checkpoints_is_written_and_read(good: list[str], examine: Callable, s3: dict[str, str]) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="doctor-checkpoints")
    code, output = examine(*good, "checkpoint.remote=s3://doctor-checkpoints/run")
    assert code == 0, output
    assert lines(output, "bucket")[0].startswith("ok")
    assert client.list_objects_v2(Bucket="doctor-checkpoints")["KeyCount"] == 0
    code, output = examine(*good, "checkpoint.remote=s3://no-such-bucket/run")
    assert code == 1
    assert lines(output, "bucket")[0].startswith("fail")
    assert "no-such-bucket" in output


def test_adapters_alone_learn_under_lora(good: list[str], seen: str, examine: Callable) -> None:
    code, output = examine(*good, "train=[llm]", "model.lora={rank: 2}", seen)
    assert code == 0, output
    # 2 x (4 projections of attention (32 + 32) + 3 of the MLP (32 + 64)) x rank 2
    assert "llm learn: 2,176 weights" in lines(output, "model")[0]


def test_what_only_an_export_reads_is_looked_at(
    good: list[str], seen: str, examine: Callable, llm: Path, clip_folder: Path
) -> None:
    code, output = examine(*good, "train=[connector,llm]", seen)
    assert code == 0, output
    assert f"reads {clip_folder} at" in lines(output, "export")[0]
    assert f"{llm}/tokenizer.model" in lines(output, "export")[0]


def another_encoder(spec: dict[str, Any], folder: Path) -> str:
    spec["encoder"]["revision"] = "0123456789abcdef"
    return "is another one by now"


def no_encoder(spec: dict[str, Any], folder: Path) -> str:
    spec["encoder"]["id"] = str(folder / "gone" / "clip" / "of another machine")
    return "cannot be read here"


def no_weights(spec: dict[str, Any], folder: Path) -> str:
    folder = Path(shutil.copytree(spec["encoder"]["id"], folder / "clip"))
    (folder / "model.safetensors").unlink()
    spec["encoder"]["id"] = str(folder)
    return "is another one by now"


@pytest.mark.parametrize("lose", [another_encoder, no_encoder, no_weights])
def test_an_encoder_that_the_end_would_miss_is_named_before_a_run_begins(
    good: list[str],
    seen: str,
    examine: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[dict[str, Any], Path], str],
) -> None:
    store = Path(shutil.copytree(seen.partition("=")[2], tmp_path / "store"))
    spec = json.loads((store / "store.json").read_text())
    words = lose(spec, tmp_path)
    (store / "store.json").write_text(json.dumps(spec))
    arguments = [*good, "train=[connector,llm]", f"data.store={store}"]
    code, output = examine(*arguments)
    assert code == 1
    assert words in lines(output, "export")[0]
    from training.train import main

    for look in (["--check"], []):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *look])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert str(stopped.value.code).startswith("error: this run could not come to its end: ")
        assert words in str(stopped.value.code)
    assert not (tmp_path / "run").exists()


def test_a_damaged_stage_1_is_named_before_stage_2_begins(good: list[str], seen: str, tmp_path: Path) -> None:
    from pipeline.manifest import read_store
    from pipeline.storage import Storage
    from training.fit.finding import run_check
    from training.fit.needs import export

    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text('{"train": [')
    settings = yaml.safe_load(Path(good[0]).read_text()) | {"train": ["connector", "llm"]}
    settings["model"]["connector_from"] = str(tmp_path / "first" / "connector")
    settings["data"]["store"] = seen.partition("=")[2]
    config = TrainConfig.model_validate(settings)
    (found,) = run_check("export", lambda: export(config, read_store(Storage(config.data.store))))
    assert (found.level, "first/config.json is damaged" in found.text) == ("fail", True)


def test_room_for_every_checkpoint_that_is_kept_is_looked_for(good: list[str], examine: Callable) -> None:
    kept = {"checkpoint.keep=2": 3, "checkpoint.keep=-1": 4, "checkpoint.keep=0": 2}  # three epochs, one each
    for setting, count in kept.items():
        _, output = examine(*good, "checkpoint.interval=1ep", setting)
        assert f"GB, {count} of them" in lines(output, "disk")[0]


def test_the_run_that_a_folder_holds_is_named(good: list[str], examine: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = load_config(TrainConfig, good[0], [])
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    code, output = examine(*good)
    assert code == 0, output
    assert "holds this run, which goes on" in lines(output, "run")[0]
    code, output = examine(*good, "optimizer.lr=1")
    assert code == 1
    assert "optimizer.lr: 0.001 -> 1.0" in output
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json is damaged" in examine(*good)[1]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"RANK": "zero"}, "RANK='zero' in the environment: a number was expected"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE='' in the environment"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "ports end at 65535"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are 0 to WORLD_SIZE - 1"),
    ],
)
def test_what_a_launcher_tells_wrongly_is_named(
    examine: Callable, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], words: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    code, output = examine()
    assert code == 1
    assert output.startswith("fail  ranks")
    assert words in output


def test_settings_without_a_configuration_are_refused(examine: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        examine("data.store=x")
    assert "need a CONFIG before them" in capsys.readouterr().err


def run_doctor(
    become_rank: Callable[[int, int, int, Path], None],
    rank: int,
    port: int,
    output: Path,
    arguments: list[str],
    patience_s: int,
) -> None:
    become_rank(rank, 2, port, output)
    machine.WAIT_S = patience_s
    sys.argv = ["doctor.py", *arguments]
    sys.exit(doctor.main())


def test_two_ranks_sum_over_their_link(
    good: list[str],
    fork: ForkServerContext,
    free_port: Callable[[], int],
    become_rank: Callable[[int, int, int, Path], None],
    ended: Callable[..., list[int]],
    hang_s: int,
    tmp_path: Path,
) -> None:
    port = free_port()
    outputs = [tmp_path / f"output-{rank}" for rank in range(2)]
    arguments = [(become_rank, rank, port, outputs[rank], good, hang_s) for rank in range(2)]
    ranks = [fork.Process(target=run_doctor, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    assert ended(ranks) == [0, 0], "".join(path.read_text() for path in outputs)
    output = outputs[0].read_text()
    assert "between 2 ranks by gloo" in lines(output, "links")[0]
    assert "8 examples / 2 rank(s) = 4 each" in lines(output, "batch")[0]
    assert "batch" not in outputs[1].read_text()


def test_a_rank_that_does_not_come_is_missed(
    monkeypatch: pytest.MonkeyPatch, examine: Callable, free_port: Callable[[], int]
) -> None:
    monkeypatch.setattr(machine, "WAIT_S", 2)  # nobody comes, however long it waits
    launcher = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    code, output = examine()
    assert code == 1
    assert "rank 0 of 2 did not reach the others at 127.0.0.1:" in lines(output, "links")[0]


def test_a_failure_on_another_rank_is_told_and_equal_lines_once() -> None:
    same = Finding("ok", "shared memory", "8 GB")
    mine, theirs = Finding("ok", "versions", "torch 2.7.0"), Finding("ok", "versions", "torch 2.6.0")
    broken = Finding("fail", "gpus", "none found")
    merged = together([[mine, same], [theirs, same, broken]])
    assert [(f.level, f.check, f.text) for f in merged[2:]] == [
        ("fail", "versions", "rank 1 differs from rank 0: torch 2.6.0"),
        ("fail", "gpus", "rank 1: none found"),
    ]


@pytest.mark.parametrize(
    ("capability", "built_for", "missing"),
    [
        ((9, 0), ["sm_80", "sm_90"], ""),
        ((8, 9), ["sm_80", "sm_90"], ""),  # Ada runs what was made for Ampere
        ((10, 0), ["sm_80", "sm_90"], "sm_100"),  # Blackwell, under torch 2.7.0's own wheel
        ((12, 0), ["sm_80", "sm_90", "sm_100"], "sm_120"),
        ((12, 0), ["sm_90", "compute_90"], ""),
        ((7, 0), ["sm_75", "sm_80"], "sm_70"),
        ((9, 0), ["sm_90a"], ""),
        ((0, 0), [], ""),  # torch for the CPU
        ((9, 0), ["gfx90a", "gfx942"], ""),  # ROCm
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_found(
    capability: tuple[int, int], built_for: list[str], missing: str
) -> None:
    assert lacks_kernels(capability, built_for) == missing


def test_the_newest_torch_that_is_locked_is_not_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = (Path(__file__).resolve().parents[2] / "infra" / "newest.txt").read_text()
    (version,) = [line.partition("==")[2] for line in newest.splitlines() if line.startswith("torch==")]
    real = machine.importlib.metadata.version
    for torch, level in ((version, "ok"), ("2.11.0+cu130", "ok"), ("2.6.0", "warn"), ("99.0", "warn")):
        monkeypatch.setattr(
            machine.importlib.metadata, "version", lambda name, torch=torch: torch if name == "torch" else real(name)
        )
        assert level in {finding.level for finding in versions()}
        assert ("warn" in {finding.level for finding in versions()}) is (level == "warn")
