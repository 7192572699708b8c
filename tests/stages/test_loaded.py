# SPDX-License-Identifier: Apache-2.0
"""A model that stays open: adapters are swapped on one copy of the base, in compiled programs."""

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters.peft import save_adapter
from jaxrlhf.models.adapters.spec import AdapterSpec, init_adapter, resolve
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.tensor_files import weights_digest

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """How many programs were compiled so far, a list of their seconds."""
    found = []

    def heard(event, seconds, **kwargs):
        if event == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield found
    jax.monitoring.unregister_event_duration_listener(heard)


def adapter_folder(model, place, seed, heads=(), content=None, **keys):
    """A PEFT folder of random leaves on an open model's base."""
    adapter = resolve(AdapterSpec(**keys), model.config, heads=heads)
    params = dict(model.params)
    if heads:
        params = {name: leaf for name, leaf in params.items() if name != "lm_head"}
        params["score"] = {"kernel": np.ones((model.config.hidden_size, 1), np.float32)}
    leaves = init_adapter(jax.random.key(0), adapter, params, "float32", config=model.config)
    own, frozen = adapter.split(join(leaves, params))
    rng = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), own)
    save_adapter(
        place,
        join(own, frozen),
        adapter,
        model.config,
        kind="reward" if heads else "lm",
        base=str(model.home),
        base_content=content or weights_digest(model.home),
    )
    return place


def test_adapters_share_the_base_and_its_programs(models, tmp_path, compilations):
    base = jaxrlhf.load(models.base)
    under = base._loaded.model
    folders = [adapter_folder(under, tmp_path / str(seed), seed, rank=2) for seed in (1, 2)]
    soft = adapter_folder(under, tmp_path / "soft", 3, kind="soft_prompt", virtual_tokens=3)
    judge = adapter_folder(under, tmp_path / "judge", 4, heads=("score",), rank=2)
    first, second = map(base.with_adapter, folders)

    def said(model):
        text = model.generate(["where is", "my order"], temperature=0, max_new_tokens=4)
        return text, model.score(["where is"] * 2, [" my order", " it"])

    before = said(base)
    found = said(first)
    count = len(compilations)
    assert count > 0
    other = said(second)
    assert said(first) == found  # back again
    assert len(compilations) == count
    assert said(base) == before
    assert len({str(each[1]) for each in (before, found, other)}) == 3

    more = [second.with_adapter(place) for place in (soft, judge)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(under.params["layers"]):
        for model in (first, second, *more):
            there = model._loaded.model.params["layers"]
            for key in path:
                there = there[key.key]
            assert there.unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer()
    assert more[1].score("where is", " my order") != more[0].score("where is", " my order")

    with pytest.raises(ModelError, match=r"is a reward model .*: score with it"):
        more[1].generate("where is")
    alone = jaxrlhf.load(folders[1])  # opened on its own, base and all
    np.testing.assert_allclose(said(alone)[1], other[1], rtol=1e-6)
    assert said(alone)[0] == other[0]


def test_what_is_no_adapter_of_this_base_is_refused(models, tmp_path):
    base = jaxrlhf.load(models.base)
    with pytest.raises(ModelError, match="is no adapter"):
        base.with_adapter(models.base)
    folder = adapter_folder(base._loaded.model, tmp_path / "other", 1, content="0" * 64, rank=2)
    with pytest.raises(ModelError, match="trained on other weights"):
        base.with_adapter(folder)
