"""Backward maps on disk: what is read back is sound, or it is told why not."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spryfl.config import TaskConfig
from spryfl.errors import ModelError
from spryfl.gradients.backward_maps import MapSettings
from spryfl.gradients.guesses import NUM_POSITIONS, BackwardMap, cosines_of
from spryfl.models.map_file import Purpose, read_maps, task_fingerprint, write_maps

Maps = dict[str, Tensor]


def test_a_prompt_is_the_same_whatever_its_fields_are_called() -> None:
    def of(template: str) -> str:
        return task_fingerprint(TaskConfig(kind="prompted", template=template, label_words=(" a", " b")))

    assert of("{text} It was") == of("{sentence} It was")
    assert of("{a} or {b}, {a}") == of("{b} or {a}, {b}")
    assert len({of("{a} It was"), of("{a} It is"), of("{a} It was {a}"), of("{a} It was {b}"), of("It was")}) == 5


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda maps: {k: v for k, v in maps.items() if k != "0/own"}, "lacks 0/own"),
        (lambda maps: maps | {"upper/own": maps["0/own"]}, "upper/own is no map"),
        (lambda maps: maps | {"1/own": maps["0/own"]}, "1/own is no map"),
        (
            lambda maps: maps | {"0/own": maps["0/own"][:, 1:].contiguous()},
            r"0/own is torch.float32 of shape \(2, 7\), not .*2, 8",
        ),
        (lambda maps: maps | {"basis": torch.tensor(1.0)}, r"basis is torch.float32 of shape \(\)"),
        (lambda maps: maps | {"basis": maps["basis"].int()}, "basis is torch.int32"),
        (lambda maps: maps | {"0/across": maps["0/across"] * math.nan}, "0/across has a value that is not finite"),
    ],
)
def test_maps_are_sound_before_any_client_gets_them(change: Callable[[Maps], Maps], fault: str, tmp_path: Path) -> None:
    maps = {0: BackwardMap(torch.ones(8, 2), torch.ones(2, 8), torch.ones(NUM_POSITIONS, 2, 8))}
    path, purpose = tmp_path / "maps.safetensors", Purpose("base", "task", MapSettings())
    write_maps(path, maps, {0: 0.5}, purpose, "words")
    sound = read_maps(path, purpose, num_layers=2, hidden=8)
    assert cosines_of(sound) == {0: 0.5}
    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    save_file({name: tensor.clone() for name, tensor in change(sound).items()}, path, metadata)
    with pytest.raises(ModelError, match=f"{fault}.* spry fit-maps"):
        read_maps(path, purpose, num_layers=2, hidden=8)
