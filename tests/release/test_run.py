"""A store that the build job made, a run on it, and the folder that comes out: the same image, cached or live."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.codec import from_payload
from pipeline.demo_data import draw
from pipeline.manifest import read_store
from pipeline.storage import Storage
from training.export import main
from training.fit.trained import export_run
from training.model.model import CompactVisionForConditionalGeneration
from training.model.processor import CompactVisionProcessor
from training.release.card import trained
from training.release.folder import push

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8
BLOCKS = "[1,2,4]"


def shell(*command: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, *command], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder, images=20, heldout=2, image_size=48)
    return folder


@pytest.fixture(scope="module")
def store(scenes: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 store of the scenes, computed in bf16, through the real job."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    settings = [f"data={scenes}/instruct.json", f"images={scenes}/images", f"store={folder}", f"encoder={clip_folder}"]
    settings += [f"blocks={BLOCKS}", "compute=bfloat16", "shard_size=12", f"batch_size={BATCH}", "workers=1"]
    shell("pipeline/build_shards.py", *settings)
    return folder


@pytest.fixture(scope="module")
def run(store: Path, llm_folder: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of stage 2, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "finetune"
    settings = [f"run={folder}", f"data.store={store}", f"model.llm={llm_folder}", f"model.connector.blocks={BLOCKS}"]
    settings += [f"model.tokenizer={tiny_tokenizer}", "model.activation_checkpointing=false"]
    settings += ["data.group_by_length=false", "data.max_length=512", "precision=fp32", "device=cpu", "steps=3"]
    settings += ["global_batch_size=4", "checkpoint.interval=1ba", "optimizer.lr=1e-3", "model.connector_from=null"]
    shell("training/train.py", "training/finetune.yaml", *settings)
    return folder


def test_an_image_is_the_same_to_the_model_whether_cached_or_live(store: Path, run: Path, scenes: Path) -> None:
    model = CompactVisionForConditionalGeneration.from_pretrained(run / "model", dtype=torch.bfloat16)
    process = CompactVisionProcessor.from_pretrained(run / "model").image_processor
    spec, images = read_store(Storage(str(store))), 0
    for path in sorted(store.glob("commits/*.json")):
        commit = json.loads(path.read_text())
        for first in range(0, len(commit["keys"]), BATCH):  # as the job's batches are cut
            batch = slice(first, first + BATCH)
            cached = _columns(store, spec, commit, batch)
            pictures = [Image.open(scenes / "images" / name) for name in commit["images"][batch]]
            pixels = process(pictures, return_tensors="pt")["pixel_values"].bfloat16()
            live = model.encode_images(pixels)
            assert live.keys() == cached.keys()
            assert all(torch.equal(live[name], cached[name]) for name in live)  # bit for bit
            ids = torch.tensor([[1, 5, *[736] * 4, 8]] * len(pictures))
            logits = model(ids, columns=cached).logits
            assert torch.equal(model(ids, pixel_values=pixels).logits, logits)
            alone = model(ids[:1], pixel_values=pixels[:1]).logits  # another batch: other kernels, other rounding
            assert (alone - logits[:1]).abs().max() <= 0.02 * logits.abs().max()
            images += len(pictures)
    assert images == len({r["image"] for r in json.loads((scenes / "instruct.json").read_text()) if "image" in r})


def _columns(store: Path, spec, commit: dict, batch: slice) -> dict[str, torch.Tensor]:
    columns = {}
    for column in spec.columns:
        with tarfile.open(store / column.name / f"{commit['shard']:05d}.tar") as tar:
            members = [f"{key}.{column.name}.bf16" for key in commit["keys"][batch]]
            payload = b"".join(tar.extractfile(name).read() for name in members)
        rows = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(len(members), -1)
        columns[column.name] = from_payload(rows, column, "bf16", torch.bfloat16)
    return columns


def test_the_card_holds_the_runs_numbers(run: Path, store: Path) -> None:
    card = (run / "model" / "README.md").read_text()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    spec = read_store(Storage(str(store)))
    for fact in (
        f"3 steps in {sum(line['step_s'] for line in log):,.0f} s",
        f"loss {log[0]['loss']:.4f} at the first step, {sum(line['loss'] for line in log) / 3:.4f} over the last 3",
        "| optimizer.lr | `0.001` |",
        "| data.template | `v1` |",
        spec.dataset,
        "4 of 16 patch tokens",
        "KV cache of an image | 0.003906 MiB, instead of 0.01562",
    ):
        assert fact in card
    assert "Scores" not in card
    assert "were skipped" not in card


def test_the_card_calls_no_other_step_the_first(run: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (later / "log.jsonl").read_text().splitlines(keepends=True)
    (later / "log.jsonl").write_text("".join(lines[1:]))  # the run went on after its log was lost
    (text,) = trained(later)
    assert f"loss {json.loads(lines[1])['loss']:.4f} at step 2, the first that its log holds, " in text


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_run_comes_out_from_its_end_or_from_a_checkpoint_with_scores(run: Path, tmp_path: Path, end: str) -> None:
    scores = tmp_path / "heldout.scores.json"
    known = {"questions": 8, "accuracy": 0.625, "interval": [0.5, 0.75], "categories": {"color": {"accuracy": 0.5}}}
    scores.write_text(json.dumps(known))
    benchmark = {"questions": 20, "answered": 19, "headline": "f1", "score": 81.234, "interval": [70.5, 90.25]}
    (tmp_path / "pope.scores.json").write_text(json.dumps({**benchmark, "scores": {"f1": {"score": 81.234}}}))
    checkpoint = None if end == "finished" else max((run / "checkpoints").glob("ba*"))
    export_run(run, tmp_path / "out", checkpoint, None if checkpoint else "bfloat16", sorted(tmp_path.glob("*.json")))
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    dtype = torch.bfloat16 if checkpoint is None else torch.float32
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| heldout | accuracy 0.625 [0.5, 0.75], 8 questions, color 0.5 |" in card
    assert "| pope | f1 81.23 [70.5, 90.25], 20 questions |" in card
    assert CompactVisionProcessor.from_pretrained(tmp_path / "out").image_tokens == 4


def test_an_earlier_checkpoint_is_another_model(run: Path, tmp_path: Path) -> None:
    first = min((run / "checkpoints").glob("ba*"))
    export_run(run, tmp_path / "out", first)
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "out"))
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector", "llm"}


def test_what_is_no_run_no_checkpoint_or_no_score_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no training run: it has no config\.json"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match="has neither finished nor saved a checkpoint"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.pt is no checkpoint of training/train.py"):
        export_run(run, tmp_path / "out", tmp_path / "junk.pt")
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(ValueError, match=r"s.json holds no scores"):
        export_run(run, tmp_path / "out", scores=[tmp_path / "s.json"])
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A card\n")
    for repo, said in (("me/tiny", r"cannot be uploaded to me/tiny: .*offline mode"), ("a b/c", "uploaded to a b/c: ")):
        with pytest.raises(ValueError, match=said), pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            push(tmp_path, repo)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as one upload needs, every file inside the commit."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, self.headers.get("authorization"), body))
        reply, here = {}, f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            reply = {"url": f"{here}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            reply = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            reply = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/me/tiny/commit/{0:040}"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_folder_goes_to_the_hub_whole_in_one_commit(
    run: Path, tmp_path: Path, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    address, out = f"http://127.0.0.1:{hub.server_port}", tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    command = ["export.py", str(run), "--out", str(out), "--push", "me/tiny", "--private"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    output = "".join(capsys.readouterr())
    assert f"{address}/me/tiny" in output
    assert "hf_test" not in output
    (created,) = [json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create"]
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "tiny", "private")
    (commit,) = [body for path, _, body in hub.requests if "/commit/" in path]
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    sent = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "model.safetensors", "model.py", "tokenizer.model", "generation_config.json"} <= sent.keys()
