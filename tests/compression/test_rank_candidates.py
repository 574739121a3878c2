"""What experts get that no token reached."""

from __future__ import annotations

from torch import nn

from hylora_kernels.compression.rank_candidates import take_least_sibling
from hylora_kernels.model.structure import Target


def test_an_expert_that_nothing_reached_has_what_the_least_of_its_siblings_has():
    values = {"a.down.0": 3.0, "a.down.1": 2.0, "a.down.2": 0.1, "a.up.0": 1.0, "b.down.0": 0.2}
    found = {Target(path, nn.Identity(), (1, 1), routed=True): v for path, v in values.items()}
    found[Target("lm_head", nn.Identity(), (1, 1))] = 0.3
    unreached = ["a.down.2", "b.down.0", "lm_head"]
    said = take_least_sibling(found, lambda target: target.path not in unreached, float)
    assert said == ["a.down.2", "b.down.0"]
    after = {target.path: value for target, value in found.items()}
    assert after == values | {"a.down.2": 2.0, "lm_head": 0.3}
