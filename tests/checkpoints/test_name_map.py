"""Names of a checkpoint to parameters of the model: the same ones that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs the extra 'convert'")
pytest.importorskip("transformers", reason="needs the extra 'convert'")
import torch
from transformers import MixtralConfig
from transformers.core_model_loading import revert_weight_conversion

from qmoe_format.checkpoints.model import build
from qmoe_format.checkpoints.name_map import NameMap
from tests.conftest import MIXTRAL, random_state
from tests.refusals import refusal
from tests.tiny_models import build_model

OLD = random_state(MIXTRAL)


@pytest.fixture(scope="module")
def names() -> NameMap:
    return NameMap(build(MixtralConfig.from_dict(MIXTRAL)))


# Rules of every kind: experts, of which some are transposed or take turns; convolutions below one
# another; numbered parts; and other names within a larger model.
@pytest.mark.parametrize(
    "model_type",
    ["mixtral", "granitemoe", "gpt_oss", "inkling2_text", "kimi_linear", "qwen3_vl_moe",
     "qwen4_exp_text", "switch_transformers"],
)  # fmt: skip
def test_published_names_make_the_model(model_type: str) -> None:
    model = build_model(model_type)
    expected = model.state_dict()
    names = NameMap(model)
    for state in (expected, revert_weight_conversion(model, dict(expected))):
        made: dict[str, Any] = {}
        for load in names.loads(state).values():
            made |= load.run(model, state.__getitem__)
            shapes = names.made(load, {name: state[name].shape for name in load.names})
            assert shapes == {name: made[name].shape for name in shapes}
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(made[name], tensor), name


@given(data=st.data())
def test_every_tensor_has_one_place_whatever_else_there_is(
    names: NameMap, data: st.DataObject
) -> None:
    there = data.draw(st.permutations(list(OLD)))[: data.draw(st.integers(0, len(OLD)))]
    strange = data.draw(st.lists(st.text(st.sampled_from("ab.0"), min_size=1), unique=True))
    loads = names.loads([*there, *strange])
    placed = [name for load in loads.values() for name in load.names]
    assert sorted(placed) == sorted([*there, *strange])
    for target, load in loads.items():
        assert {names.parameter(name)[0] for name in load.names} == {target}
        assert (target in names.shapes) == all(name in OLD for name in load.names)
    shuffled = names.loads(data.draw(st.permutations([*there, *strange])))
    assert {target: load.sources for target, load in shuffled.items()} == {
        target: load.sources for target, load in loads.items()
    }


def test_experts_are_in_order_of_their_numbers(names: NameMap) -> None:
    """Not of their names: 10 comes after 9."""
    template = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    (load,) = names.loads(template.format(number) for number in reversed(range(12))).values()
    assert load.names == [template.format(number) for number in range(12)]


def test_tensors_that_do_not_fit_together(names: NameMap) -> None:
    loads = names.loads(name for name in OLD if ".experts." in name)
    load = loads["model.layers.0.mlp.experts.gate_up_proj"]
    shapes = {name: OLD[name].shape for name in load.names}
    shapes[load.names[1]] = torch.Size([5, 10])
    said = refusal(lambda: names.made(load, shapes), "checkpoint")
    assert "cannot make 'model.layers.0.mlp.experts.gate_up_proj' of" in said
    assert f"'{load.names[0]}' [6, 10] and 5 more" in said
