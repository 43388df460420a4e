"""The connector against a paged cache: what each layer's blocks hold after a step. `make serve-check` runs vLLM."""

from types import SimpleNamespace

import pytest
import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix, PrefixStore
from tests.serving.vllm.stand_in import Role, configuration, install

BLOCK, BLOCKS = 4, 12


class Layer:
    """An attention layer with a cache `[2, blocks, block, heads, D]`."""

    def __init__(self, heads: int, dimension: int) -> None:
        self.num_kv_heads, self.head_size, self.impl = heads, dimension, self
        self.kv_cache = torch.full((2, BLOCKS, BLOCK, heads, dimension), float("nan"), dtype=torch.bfloat16)

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        for at, x in enumerate((key, value)):
            assert x.dtype == cache.dtype
            cache[at].view(-1, *x.shape[1:])[slots] = x

    def tokens(self, blocks) -> torch.Tensor:
        """What the blocks hold, `[2, tokens, heads, D]`."""
        return self.kv_cache[:, blocks].flatten(1, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = make_model("llama", torch.float32)
    model.save_pretrained(tmp_path_factory.mktemp("model"))
    return model


@pytest.fixture
def store(tmp_path, model):
    store = PrefixStore(tmp_path / "store", model)
    for seed, name in enumerate(("a", "b")):
        store.put(name, KVPrefix.from_tokens(model, tokens(10, seed=seed), torch.tensor([0, 10])))
    return store


@pytest.fixture
def make(monkeypatch, store, model, tmp_path):
    """Connector halves of a rank, and its layers."""

    def made(rank: int = 0, ranks: int = 1, **changes):
        install(monkeypatch, rank)
        from ctkernels.serving.vllm.connector import PrefixConnector

        folder = tmp_path / "model"
        model.save_pretrained(folder)
        config, cache = (
            configuration(store.directory, folder, ranks, BLOCK, **changes),
            SimpleNamespace(kv_cache_groups=[0]),
        )
        halves = [PrefixConnector(config, role, cache) for role in (Role.SCHEDULER, Role.WORKER)]
        layers = {f"model.layers.{n}.self_attn.attn": Layer(2 // ranks, 8) for n in range(3)}
        halves[1].register_kv_caches({name: layer.kv_cache for name, layer in layers.items()})
        return *halves, layers

    return made


def request(salt, name="r", prompt=15, more=0, **changes):
    fields = dict(request_id=name, cache_salt=salt, num_tokens=prompt + more, num_prompt_tokens=prompt)
    return SimpleNamespace(**fields, skip_reading_prefix_cache=False, **changes)


def salt_of(worker, name, length=None):
    found = worker._files.describe(name).placed
    return str(found if length is None else type(found)(found.name, length, found.checksum))


def step(scheduler, worker, layers, *scheduled):
    """Schedule (request, tokens that vLLM has, its blocks), load, and return the blocks that failed."""
    for one, computed, blocks in scheduled:
        count, later = scheduler.get_num_new_matched_tokens(one, computed)
        assert later is False
        allocated = SimpleNamespace(get_block_ids=lambda blocks=blocks: (blocks,))
        scheduler.update_state_after_alloc(one, allocated, count)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    worker.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    return worker.get_block_ids_with_load_errors()


def expected(prefix, layer, heads=slice(None)):
    pair = (prefix.keys[layer], prefix.values[layer])
    return torch.stack([x.detach()[heads].transpose(0, 1).bfloat16() for x in pair])


def test_prefixes_of_one_batch_go_into_their_own_blocks(make, store):
    scheduler, worker, layers = make()
    plain = request(None, "plain")
    one, two = request(salt_of(worker, "a"), "one"), request(salt_of(worker, "b"), "two")
    assert step(scheduler, worker, layers, (one, 0, [7, 3, 9, 1]), (plain, 0, [2]), (two, 4, [5, 0, 8, 6])) == set()
    for number, layer in enumerate(layers.values()):
        assert torch.equal(layer.tokens([7, 3, 9])[:, :10], expected(store.get("a"), number))
        assert torch.equal(layer.tokens([0, 8])[:, :6], expected(store.get("b"), number)[:, 4:])
        untouched = layer.tokens([9])[:, 2:], layer.tokens([8])[:, 2:], layer.tokens([1, 2, 5, 6, 4, 10, 11])
        assert all(part.isnan().all() for part in untouched)
    assert worker._memory.kept.bytes == 2 * 10 * 3 * 2 * 2 * 8 * 2  # both in the cache's type
    assert step(scheduler, worker, layers) == set()


def test_a_preempted_request_is_loaded_into_its_new_blocks(make, store):
    scheduler, worker, layers = make()
    one = request(salt_of(worker, "a"))
    step(scheduler, worker, layers, (one, 0, [0, 1, 2, 3]))
    again = request(one.cache_salt, more=3)
    assert step(scheduler, worker, layers, (again, 4, [0, 10, 11, 4, 5])) == set()
    for number, layer in enumerate(layers.values()):
        assert torch.equal(layer.tokens([10, 11])[:, :6], expected(store.get("a"), number)[:, 4:])
    assert step(scheduler, worker, layers, (again, 12, [0, 10, 11, 4, 5])) == set()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_loads_its_own_heads(make, store, rank):
    scheduler, worker, layers = make(rank, 2)
    assert step(scheduler, worker, layers, (request(salt_of(worker, "a")), 0, [0, 1, 2, 3])) == set()
    for number, layer in enumerate(layers.values()):
        assert torch.equal(layer.tokens([0, 1, 2])[:, :10], expected(store.get("a"), number, slice(rank, rank + 1)))


def test_a_missing_prefix_fails_its_own_request_alone(make, store):
    scheduler, worker, layers = make()
    gone, there = request(salt_of(worker, "a"), "gone"), request(salt_of(worker, "b"), "there")
    store.remove("a")
    assert step(scheduler, worker, layers, (gone, 4, [7, 3, 9, 1]), (there, 0, [5, 0, 8, 6])) == {3, 9}
    for number, layer in enumerate(layers.values()):
        assert torch.equal(layer.tokens([5, 0, 8])[:, :10], expected(store.get("b"), number))
    assert worker.get_block_ids_with_load_errors() == set()


def test_a_replaced_prefix_fails_requests_that_chose_the_old_one(make, store, model):
    scheduler, worker, layers = make()
    old = request(salt_of(worker, "a"), "old")
    store.put("a", KVPrefix.from_tokens(model, tokens(10, seed=5), torch.tensor([0, 10])))
    new = request(salt_of(worker, "a"), "new")
    assert step(scheduler, worker, layers, (old, 0, [0, 1, 2, 3]), (new, 0, [4, 5, 6, 7])) == {0, 1, 2}
    assert torch.equal(next(iter(layers.values())).tokens([4, 5, 6])[:, :10], expected(store.get("a"), 0))


def test_requests_that_cannot_be_served_fail_and_are_not_computed(make):
    scheduler, worker, layers = make()
    bad = request("ctkernels:nonsense", "bad")
    longer = request(salt_of(worker, "a", length=11), "longer")
    scored = request(salt_of(worker, "a"), "scored")
    scored.skip_reading_prefix_cache = True
    scheduler.on_new_request(scored)
    scheduled = (bad, 0, [0, 1, 2, 3]), (longer, 0, [4, 5, 6, 7]), (scored, 0, [8, 9, 10, 11])
    assert step(scheduler, worker, layers, *scheduled) == {0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11}
    assert scored.skip_reading_prefix_cache is False
    assert scheduler.request_finished(scored, []) == (False, None)
    assert scheduler._plan._refused.keys() == {"bad"}


def test_settings_that_it_does_not_work_with_are_named(make):
    for changes, message in (
        ({"kv_transfer_config__kv_load_failure_policy": "recompute"}, "kv_load_failure_policy must be 'fail'"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "draft model"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)
    make(speculative_config=SimpleNamespace(method="ngram"))
    _, worker, _ = make()
    with pytest.raises(ValueError, match=r"no prefix holds the keys: draft\.attn"):
        worker.register_kv_caches({"draft.attn": torch.zeros(1)})
