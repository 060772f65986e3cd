import hashlib

from benchmarks.generalization.configs import FAMILIES, all_configs, is_for_fitting, pilot
from benchmarks.generalization.subset import NAMES

CONFIGS = all_configs()


def test_there_are_runs_enough_in_every_family():
    assert len(CONFIGS) >= 150
    assert {config.family for config in CONFIGS} == set(FAMILIES)


def test_names_tell_runs_apart():
    assert len({config.name for config in CONFIGS}) == len(CONFIGS)


def test_a_recipe_leaves_out_how_often_data_repeat_regularization_and_seed():
    for config in CONFIGS:
        assert set(config.recipe_keys) <= set(config.settings)
        assert not {"unique", "dropout", "noise", "seed"} & set(config.recipe_keys)


def test_the_split_is_the_one_that_was_committed_before_anything_was_fitted():
    assert _digest(1) == "f31473ba964f65d65b62be81903324b4e905e852f5deb014016aeab7a9b3ebae"
    assert _digest(2) == "9ca0b62606caf4deaa28aff94ff29543ca683a669cfe79f44cf17d9ac062de28"


def _digest(batch: int) -> str:
    """Of the configurations for fitting among those that this batch brought."""
    before = {config.configuration for config in CONFIGS if config.batch < batch}
    mine = {config.configuration for config in CONFIGS if config.batch == batch and is_for_fitting(config)}
    return hashlib.sha256("\n".join(sorted(mine - before)).encode()).hexdigest()


def test_all_seeds_of_a_configuration_are_on_one_side():
    sides: dict[str, set[bool]] = {}
    for config in CONFIGS:
        sides.setdefault(config.configuration, set()).add(is_for_fitting(config))
    assert all(len(side) == 1 for side in sides.values())
    for family in FAMILIES:
        mine = [is_for_fitting(config) for config in CONFIGS if config.family == family]
        assert 0.35 < sum(mine) / len(mine) < 0.65


def test_the_pilot_is_thirty_runs_of_the_fitting_half():
    assert 30 <= len({config.name for config in pilot()}) <= 35
    assert all(is_for_fitting(config) for config in pilot())


def test_the_subset_is_made_of_runs_of_the_benchmark():
    assert set(NAMES) <= {config.name for config in CONFIGS}
    assert not any("prose" in name for name in NAMES), "that text needs a Debian package"
