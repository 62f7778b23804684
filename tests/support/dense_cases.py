"""What tests share: dense_cases."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from bridge.models.dense import DenseModelError, load_dense


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def refusal(model: Any, **settings: Any) -> str:
    with pytest.raises(DenseModelError) as error:
        load_dense(model, **settings)
    message = str(error.value)
    assert "\n" not in message and len(re.sub(r"'/[^']*'", "''", message)) < 400  # folders are as long as the machine makes them
    return message
