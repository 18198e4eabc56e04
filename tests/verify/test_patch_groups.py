"""Holding the changed neurons at what they are later does what the later model does; silencing loud ones does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.find.test_projection_change import DATA, VECTOR, changed

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.find.projection_change import projection_change


def along(model: pc.Model, batch: Any) -> torch.Tensor:
    """The projection of the output."""
    return batch.run(model) @ torch.as_tensor(VECTOR / np.linalg.norm(VECTOR), dtype=torch.float32)


def test_groups_reproduce_what_the_later_model_does() -> None:
    before, after = changed({3: 0.5, 7: -0.8, 11: 0.2, 12: -0.4})
    found = projection_change(before, after, DATA, VECTOR, "mlp.0")
    table = pc.verify.patch_groups(before, after, found, along, DATA, ablated=2)
    rows = {row["what"]: row for row in table.to_dicts()}
    # The output is linear in the neurons: means are all that counts.
    assert rows["all groups"]["effect"] == pytest.approx(rows["the later model"]["effect"], abs=1e-5)
    assert rows["all groups"]["share"] == pytest.approx(1, abs=1e-3)
    groups = [row for what, row in rows.items() if "," in what]
    assert sum(row["effect"] for row in groups) == pytest.approx(rows["all groups"]["effect"], abs=1e-5)
    silenced = rows["silencing the 2 neurons that write most along it"]
    assert silenced["share"] != pytest.approx(1, abs=0.05) and silenced["neurons"] == 2


def test_bad_input() -> None:
    before, after = changed({3: 0.5})
    with pytest.raises(DataError, match="no column 'group'"):
        pc.verify.patch_groups(before, after, pc.Neurons({"mlp.0": [3]}), along, DATA)
