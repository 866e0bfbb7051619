"""What a worker does to the weights it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memedit.errors import NumericalError
from memedit.files import LocalFiles
from memedit.model import ModelSpec
from memedit.solve import Update
from memedit.worker import Worker
from tests.tiny import save_tiny

LAYER = 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # stored [out, in], and [in, out]
def test_an_update_is_rounded_as_it_will_be_stored(tmp_path: Path, name: str) -> None:
    worker = Worker(ModelSpec(files=LocalFiles(save_tiny(tmp_path, name, dtype=torch.bfloat16))))
    arch, model = worker.loaded.arch, worker.loaded.model
    weight = arch.rewrite_module(model, LAYER).weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32
    before_OI = arch.oriented(weight.detach().clone())
    delta_OI = torch.randn(before_OI.shape, generator=torch.Generator().manual_seed(0)).double()
    exact_OI = before_OI.double() + delta_OI
    list(worker.apply(Update(layer=LAYER, left_NO=delta_OI.T, right_NI=None), torch.bfloat16))
    after_OI = arch.oriented(weight.detach())
    assert torch.equal(after_OI, exact_OI.bfloat16().float())
    assert not torch.equal(after_OI, exact_OI.float())


def test_a_sum_beyond_the_stored_dtype_is_named(tmp_path: Path) -> None:
    worker = Worker(ModelSpec(files=LocalFiles(save_tiny(tmp_path))))
    shape = worker.loaded.arch.rewrite_module(worker.loaded.model, LAYER).weight.shape
    delta_OI = torch.full(tuple(shape), 1e5, dtype=torch.float64)  # type: ignore[arg-type]
    with pytest.raises(NumericalError, match=r"layer 1 .*float16"):
        list(worker.apply(Update(layer=LAYER, left_NO=delta_OI.T, right_NI=None), torch.float16))
