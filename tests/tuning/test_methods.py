"""The method table and the settings."""

from dataclasses import fields

import pytest
import torch

from ctkernels import tuning
from ctkernels.tuning.batches import make_batch
from ctkernels.tuning.data import encode_context, encode_rows
from ctkernels.tuning.methods import METHODS, get_method
from ctkernels.tuning.settings import TrainSettings
from tests.tuning.tasks import DEMONSTRATIONS, char_tokenizer


def test_table():
    assert list(METHODS) == ["zero-shot", "icl", "ct-kv"]
    assert all(name == method.name for name, method in METHODS.items())
    assert {name: method.trains for name, method in METHODS.items()} == {
        "zero-shot": "nothing",
        "icl": "nothing",
        "ct-kv": "prefix",
    }


def test_every_public_name_of_the_package_is_there():
    assert all(getattr(tuning, name).__name__ == name for name in tuning.__all__ if name != "METHODS")
    assert tuning.METHODS is METHODS
    with pytest.raises(AttributeError, match="has no attribute 'tun'"):
        tuning.tun  # noqa: B018


def test_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="must be one of zero-shot, icl, ct-kv, got 'ctkv'; did you mean 'ct-kv'"):
        get_method("ctkv")


def test_defaults_name_settings_and_overrides_win():
    names = {field.name for field in fields(TrainSettings)}
    assert all(set(method.defaults) <= names for method in METHODS.values())
    settings = get_method("ct-kv").settings(lr=0.5)
    assert (settings.lr, settings.epochs, settings.drop_p, settings.leave_one_out) == (0.5, 25, 0.05, True)


def test_ct_kv_hides_the_own_segment_and_drops_by_row_and_seed():
    rows = encode_rows(char_tokenizer(), DEMONSTRATIONS)
    context = encode_context(char_tokenizer(), DEMONSTRATIONS)
    length, segments = len(context.input_ids), context.segments
    ct_kv = get_method("ct-kv")

    def visible(picked, **overrides):
        settings = ct_kv.settings(**overrides)
        return ct_kv.mask(settings, segments, make_batch(rows, picked), settings.dropout_seed(4)).dense(
            len(picked), length
        )

    for b, shown in enumerate(visible([0, 3], drop_p=0.0)):
        own = [0, 3][b]
        expected = torch.ones(length, dtype=torch.bool)
        expected[segments[own] : segments[own + 1]] = False
        assert torch.equal(shown, expected)
    assert visible([0, 3], drop_p=0.0, leave_one_out=False).all()
    dropped = visible([0, 1, 2, 3], drop_p=0.4, leave_one_out=False)
    # a row drops the same tokens in whatever batch it runs, another seed drops others
    assert torch.equal(visible([3, 1], drop_p=0.4, leave_one_out=False), dropped[[3, 1]])
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(visible([0, 1, 2, 3], drop_p=0.4, leave_one_out=False, seed=1), dropped)


def test_every_epoch_and_seed_draws_anew():
    seeds = {TrainSettings(seed=seed).dropout_seed(epoch) for seed in (0, 1, 2**31 - 1) for epoch in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"drop_p": 1.0}, r"drop_p must be in \[0, 1\), got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None, got 0.0"),
        ({"seed": -1}, r"seed must be in \[0, 2147483647\], got -1"),
        ({"layout": "ragged"}, "layout must be packed or padded, got 'ragged'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**setting)
