"""Connectors: the published numbers, the paper's shapes and parameter counts, and mistakes that are named."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from training.model.reducers import FAMILIES, build_connector, connector_config
from training.model.reducers.fusion import PAPER_BLOCKS, RELEASED_BLOCKS
from training.model.reducers.fusion_layers import windows
from training.release.llava import connector_from_released

TINY = {"grid": 4, "vision_width": 8, "llm_width": 16, "blocks": (1, 2, 3), "block": 3}


def parameters(**settings: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_connector(connector_config(**settings)).parameters())


def random_columns(connector, n=2, dtype=torch.float32):
    c = connector.config
    return {name: torch.randn(n, c.grid**2, c.vision_width, dtype=dtype) for name in connector.columns}


@pytest.mark.vectors("released_projector*.npz")
def test_the_released_topology_computes_what_the_original_code_computed(vectors: Path) -> None:
    arrays = np.load(vectors, allow_pickle=False)
    weights = {f"model.{name[3:]}": torch.from_numpy(arrays[name]) for name in arrays if name.startswith("w::")}
    connector = connector_from_released(weights)
    features = [name for name in arrays if name.startswith("feat::")]
    assert [int(name.split("::")[1]) for name in features] == list(range(8))
    columns = {
        name: torch.from_numpy(arrays[feature]) for name, feature in zip(connector.columns, features, strict=True)
    }
    with torch.no_grad():
        fused = connector.mbtf(torch.cat(list(columns.values()), dim=-1))
        tokens = connector(columns)
    for ours, theirs in ((fused, arrays["mbtf_fp32"]), (tokens, arrays["y_fp32"])):
        assert ours.shape == theirs.shape
        assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_the_released_topology_reads_blocks_from_the_deepest_down() -> None:
    assert connector_config(preset="released").columns[0] == "block23"
    assert connector_config(preset="released").blocks == RELEASED_BLOCKS == (23, 21, 18, 15, 12, 9, 6, 3)
    assert connector_config().blocks == PAPER_BLOCKS == (3, 6, 9, 12, 15, 18, 21, 24)


def test_released_weights_that_lack_a_key_or_hold_another_are_refused_by_name() -> None:
    state = {f"model.mm_projector.{i}.{kind}": torch.zeros(1, 1) for i in (0, 2) for kind in ("weight", "bias")}
    more = {"model.mm_projector_crosslayer.0.weight": torch.zeros(1, 1), "model.mm_projector.4.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing .*mm_projector_crosslayer.2.weight.*not used .*mm_projector.4.bias"):
        connector_from_released({**state, **more})


@pytest.mark.parametrize(
    ("k", "fused", "tokens", "first", "second", "stf"),
    [
        (2, 1, 144, 16_781_312, 67_125_248, 151_019_520),
        (2, 2, 288, 16_781_312, 33_570_816, 117_465_088),
        (4, 4, 144, 268_451_840, 67_125_248, 402_690_048),
        (4, 8, 288, 268_451_840, 33_570_816, 369_135_616),
        (8, 16, 144, 4_295_032_832, 67_125_248, 4_429_271_040),
        (8, 32, 288, 4_295_032_832, 33_570_816, 4_395_716_608),
    ],
)
def test_tokens_and_parameters_of_table_4_at_7b(
    k: int, fused: int, tokens: int, first: int, second: int, stf: int
) -> None:
    with torch.device("meta"):
        built = build_connector(connector_config(arm="stf", kernel_size=k, fused_tokens=fused))
        image = torch.zeros(3, 576, 1024)
    layers = (built.stf.fuse, built.stf.project[0], built.stf.project[2])
    assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == [first, second, 67_112_960]
    assert built({"block23": image}).shape == (3, tokens, 4096)
    assert connector_config(kernel_size=k, fused_tokens=fused).tokens == tokens
    assert parameters(arm="stf", kernel_size=k, fused_tokens=fused) == stf
    assert parameters(arm="mbtf+stf", kernel_size=k, fused_tokens=fused) == stf + 37_753_856


def test_parameters_of_both_presets_and_of_the_baselines_at_7b() -> None:
    assert parameters() == 188_773_376
    assert parameters(preset="released") == 171_992_064
    assert parameters(preset="released", arm="stf") == 134_238_208
    assert parameters(arm="mlp") == parameters(arm="avgpool") == 20_979_712
    assert parameters(arm="mbtf") == 37_753_856 + 20_979_712
    assert parameters(arm="tokenconcat") == 33_562_624
    with torch.device("meta"):
        ours, theirs = (
            build_connector(connector_config(preset="released", llm_width=5120, hidden_width=hidden)).stf.fuse
            for hidden in (None, 16_384)
        )
    assert (ours.out_features, theirs.out_features) == (20_480, 16_384)  # at 13B
    assert connector_config(kernel_size=3).tokens == 64
    assert connector_config(kernel_size=1).tokens == 576


@pytest.mark.parametrize(("fused", "width"), [(1, 4096), (2, 2048)])
def test_layer_widths_of_table_1_and_4(fused: int, width: int) -> None:
    with torch.device("meta"):
        stf = build_connector(connector_config(fused_tokens=fused)).stf
    assert stf.fuse.weight.shape == (4096, 4096)
    assert stf.project[0].weight.shape == (16384, width)
    assert stf.project[2].weight.shape == (4096, 16384)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("arm", FAMILIES)
def test_every_arm_makes_as_many_tokens_as_it_says_and_learns(arm: str, preset: str) -> None:
    connector = build_connector(connector_config(arm=arm, preset=preset, **TINY))
    tokens = connector(random_columns(connector))
    assert tokens.shape == (2, connector.tokens, 16)
    assert connector.tokens == (16 if arm in ("mbtf", "mlp") else 4)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())


@pytest.mark.parametrize("arm", FAMILIES)
def test_no_image_gives_no_token_and_gradients_of_zero(arm: str) -> None:
    connector = build_connector(connector_config(arm=arm, **TINY))
    tokens = connector(random_columns(connector, n=0))
    assert tokens.shape == (0, connector.tokens, 16)
    (tokens.sum() * 0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in connector.parameters())


def test_single_block_arms_read_the_second_to_last_block_alone() -> None:
    for arm in ("mlp", "stf", "avgpool", "tokenconcat"):
        assert connector_config(arm=arm).columns == ("block23",)
    assert connector_config(arm="mlp", block=7).columns == ("block07",)


@settings(max_examples=30)
@given(k=st.integers(1, 6), side=st.integers(1, 4), channels=st.integers(1, 5), out=st.integers(1, 7))
def test_fusing_windows_is_a_convolution_with_the_same_weights(k: int, side: int, channels: int, out: int) -> None:
    grid = k * side
    x = torch.randn(2, grid * grid, channels, dtype=torch.float64)
    weight = torch.randn(out, channels * k * k, dtype=torch.float64)
    image = x.transpose(1, 2).reshape(2, channels, grid, grid)
    expected = F.conv2d(image, weight.view(out, channels, k, k), stride=k).flatten(2).transpose(1, 2)
    torch.testing.assert_close(F.linear(windows(x, grid, k), weight), expected, rtol=1e-12, atol=1e-12)


def test_the_e_tokens_of_a_window_are_slices_of_its_channels_side_by_side() -> None:
    config = connector_config(arm="stf", kernel_size=2, fused_tokens=2, grid=4, vision_width=8, llm_width=16)
    connector = build_connector(config)
    seen: list[torch.Tensor] = []
    connector.stf.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    columns = random_columns(connector, n=1)
    connector(columns)
    fused = F.gelu(connector.stf.fuse(windows(columns["block23"], 4, 2)))
    assert seen[0].shape == (1, 8, 16)
    for window in range(4):
        for e in range(2):
            torch.testing.assert_close(seen[0][0, 2 * window + e], fused[0, window, 16 * e : 16 * (e + 1)])


def test_avgpool_pools_before_or_after_the_projector_as_told() -> None:
    before, after = (
        build_connector(connector_config(arm="avgpool", pool=pool, **TINY)) for pool in ("before", "after")
    )
    after.load_state_dict(before.state_dict())
    columns = random_columns(before)
    image = columns["block03"].transpose(1, 2).reshape(2, 8, 4, 4)
    pooled = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(before(columns), before.mlp(pooled))
    projected = before.mlp(columns["block03"]).transpose(1, 2).reshape(2, 16, 4, 4)
    torch.testing.assert_close(after(columns), F.avg_pool2d(projected, 2).flatten(2).transpose(1, 2))
    assert not torch.allclose(before(columns), after(columns))


def test_gelu_is_the_exact_form() -> None:
    for arm in FAMILIES:
        for module in build_connector(connector_config(arm=arm, **TINY)).modules():
            assert getattr(module, "approximate", "none") == "none"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kernel_size": 5}, r"kernel_size 5 does not divide the grid of 24 x 24; use \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        ({"kernel_size": 2, "fused_tokens": 4}, r"fused_tokens 4 is not below kernel_size\^2 = 4"),
        ({"kernel_size": 1, "fused_tokens": 2}, r"fused_tokens 2 is not below kernel_size\^2 = 1"),
        ({"fused_tokens": 3}, r"fused_tokens 3 does not divide the fused width C2 = k\*k\*C1 = 4096"),
        ({"fused_tokens": 0}, "fused_tokens 0"),
        ({"arm": "avgpool", "fused_tokens": 2}, "avgpool makes one token of a window"),
        ({"arm": "perceiver"}, r"'perceiver' is unknown; choose one of mbtf\+stf, mbtf"),
        ({"hidden_width": 64}, "hidden_width 64 is of STF in the released preset"),
        ({"hidden_width": 64, "preset": "released", "arm": "mlp"}, "leave it out of mlp"),
        ({"hidden_width": 63, "preset": "released", "fused_tokens": 2}, "does not divide .* = 63"),
        ({"preset": "official"}, "'official' is unknown; choose one of paper, released"),
        ({"blocks": (3, 3)}, r"\[3, 3\] names a block twice"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_reason(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        connector_config(**wrong)


def test_a_column_that_the_store_lacks_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"needs block24; there is only block03, .*block21"):
        build_connector(connector_config(), available=[f"block{b:02d}" for b in (3, 6, 9, 12, 15, 18, 21)])


def test_a_missing_or_misshapen_column_is_named() -> None:
    connector = build_connector(connector_config(**TINY))
    columns = random_columns(connector)
    with pytest.raises(ValueError, match=r"column block02 has shape \(2, 9, 8\); expected \(images, 16, 8\)"):
        connector({**columns, "block02": torch.zeros(2, 9, 8)})
    del columns["block03"]
    with pytest.raises(ValueError, match="needs column block03; given: block01, block02"):
        connector(columns)


def test_bf16_columns_meet_fp32_weights_with_and_without_autocast() -> None:
    connector = build_connector(connector_config(**TINY))
    columns = random_columns(connector, dtype=torch.bfloat16)
    exact = connector(columns)
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = connector(columns)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("arm", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_connector_is_one_graph_for_any_number_of_images(arm: str, autocast: bool) -> None:
    torch._dynamo.reset()
    eight = {**TINY, "blocks": (1, 2, 3, 4, 5, 6, 7, 8)}  # more columns than torch.compile compiles a function anew
    connector = build_connector(connector_config(**eight, arm=arm))
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for n in (3, 5, 2, 1, 0, 8, 1):
        columns = random_columns(connector, n, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            connector._compiled = None
            expected = connector(columns)
            if not graphs:
                connector.compile(backend=count, fullgraph=True)
                compiled = connector._compiled
            connector._compiled = compiled
            found = connector(columns)
        assert torch.equal(found, expected)
        found.float().sum().backward()
    assert len(graphs) == 1
    other = copy.deepcopy(connector)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    columns = random_columns(other, 3)
    assert not other(columns).any() and connector(columns).any()
