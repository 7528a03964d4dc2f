"""A family's member that is not there, or is not what its family asks or what it declares, is refused in words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError, load_config
from pipeline.encoder import Encoder, columns_of, describe_encoder
from pipeline.encoders import ENCODERS, encoder_of
from pipeline.encoders.base import VisionEncoder
from pipeline.encoders.clip import Clip
from training.config import ENGINES, TrainConfig
from training.cost.flops import check_connector
from training.engines.base import Engine
from training.model.decoders import DECODERS, decoder_of
from training.model.reducers import FAMILIES, build_connector, connector_config
from training.model.reducers.connector import Connector
from training.model.reducers.fusion import FusionConfig

ROOT = Path(__file__).resolve().parents[2]
GRID, WIDTH = 4, 32


def test_members_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'perceiver' is unknown; choose one of mbtf\+stf"):
        connector_config(arm="perceiver")
    with pytest.raises(ValueError, match="'bert' is not known; choose one of type clip"):
        encoder_of("bert")
    with pytest.raises(ValueError, match="'gpt2' is not known; choose one of type llama"):
        decoder_of("gpt2")


class Halves(Connector):
    """A connector without `reduce`."""


class HalfAnEngine(Engine):
    """An engine without a method."""


class HalfAnEncoder(VisionEncoder):
    """An encoder without a method."""


def test_a_line_that_names_no_whole_member_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Connector.__module__], "Halves", Halves, raising=False)
    for line, said in (
        ("gone:Gone", "names 'gone:Gone' in FAMILIES: No module named .*gone'; correct that line"),
        ("fusion:Gone", "names 'fusion:Gone' in FAMILIES: .* has no attribute 'Gone'"),
        ("fusion", "names 'fusion' in FAMILIES"),
        ("connector:Halves", "connector:Halves of training/model/reducers lacks reduce; write it there"),
    ):
        monkeypatch.setitem(FAMILIES, "half", (line, line))
        with pytest.raises(ValueError, match=said):
            connector_config(arm="half")
        with pytest.raises(ConfigError, match=said):
            load_config(TrainConfig, ROOT / "training" / "pretrain.yaml", ["model.connector.arm=half"])
    for line, said in (("gone:GONE", "in DECODERS: No module"), ("llama:CHAT_TEMPLATE", "is no Decoder, but '")):
        monkeypatch.setitem(DECODERS, "half", line)
        with pytest.raises(ValueError, match=said):
            decoder_of("half")
    monkeypatch.setattr(sys.modules[VisionEncoder.__module__], "Half", HalfAnEncoder, raising=False)
    for line, said in (("clip:Gone", "in ENCODERS: .* no attribute"), ("base:Half", "lacks embed, .*write it there")):
        monkeypatch.setitem(ENCODERS, "half", line)
        with pytest.raises(ValueError, match=said):
            encoder_of("half")
    monkeypatch.setattr(sys.modules[Engine.__module__], "Half", HalfAnEngine, raising=False)
    for line, said in (
        ("training.gone:Gone", "ENGINES in training/config.py names 'training.gone:Gone': No module"),
        ("training.engines.base:Half", "training.engines.base:Half lacks .*; write it there"),
    ):
        monkeypatch.setitem(ENGINES, "half", line)
        with pytest.raises(ConfigError, match=said):
            load_config(TrainConfig, ROOT / "training" / "pretrain.yaml", ["parallelism=half"])


class WrongCost(FusionConfig):
    """Says that it costs nothing."""

    def flops(self) -> int:
        return 0


class TooFew(FusionConfig):
    """Says that later layers see fewer tokens."""

    def tokens_per_layer(self, layers: int) -> tuple[int, ...]:
        return (self.tokens,) + (1,) * (layers - 1)


def test_a_connector_that_is_not_what_it_declares_is_refused() -> None:
    shape = {"grid": GRID, "vision_width": WIDTH, "llm_width": 48}
    check_connector(FusionConfig("avgpool", **shape))
    with pytest.raises(ValueError, match=r"makes \(1, 16, 48\) with 122880 FLOPs, but declares \(1, 16, 48\) with 0"):
        check_connector(WrongCost("mlp", **shape))
    with pytest.raises(ValueError, match=r"declares \(16, 1\) tokens in two layers"):
        build_connector(TooFew("mlp", **shape))


class NoPrefix(Clip):
    """Forgets the CLS token."""

    prefix = 0


def test_an_encoder_that_counts_its_tokens_wrongly_is_refused_before_anything_is_stored(clip_folder: Path) -> None:
    spec = describe_encoder(str(clip_folder), None)
    for columns, reason in ((((1,), ()), "expected .*correct NoPrefix.prefix"), (((), (1,)), "has no CLS token")):
        encode = Encoder(str(clip_folder), None, columns_of(spec, *columns), "float32")
        encode.family = NoPrefix()
        with pytest.raises(ValueError, match=reason):
            encode(torch.zeros(1, 3, spec.image_size, spec.image_size))
