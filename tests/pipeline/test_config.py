"""Two sets of settings: what differs is named."""

from __future__ import annotations

from pipeline.config import differences


def test_what_differs_is_named_with_both_values() -> None:
    theirs, mine = {"seed": 0, "codec": "bf16", "old": 1}, {"seed": 3, "codec": "bf16", "new": None, "limit": 5}
    assert differences(theirs, mine) == ["seed: 0 there, 3 now", "limit: None there, 5 now"]
    assert differences(theirs, mine, "in the checkpoint")[0] == "seed: 0 in the checkpoint, 3 now"
