"""Which layer is taken for the unembedding, and what is said where none can be."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from logalign.errors import InputError, SiteError
from logalign.torch.linear import weight_of
from logalign.torch.sites import find_sites


class Language(nn.Module):
    def __init__(self, head="lm_head", *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        setattr(self, head, nn.Linear(6, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.embedding.weight


class WithGetter(Language):
    def __init__(self):
        super().__init__(head="decoder")

    def get_output_embeddings(self):
        return self.decoder


def only(model, layers="unembedding"):
    found = find_sites(model, layers)
    assert found.candidates == ()
    (site,) = found.sites
    assert found.main == "unembedding"
    assert site.label == "unembedding"
    return site


def test_output_embeddings_come_first():
    model = WithGetter()
    model.lm_head = nn.Linear(6, 3)
    site = only(model)
    assert site.module is model.decoder
    assert (site.name, site.how) == ("decoder", "WithGetter.get_output_embeddings()")


def test_output_embeddings_of_a_wrapped_model():
    model = nn.ModuleDict({"inner": WithGetter()})
    assert only(model).name == "inner.decoder"


def test_output_embeddings_that_are_none_are_passed_over():
    class Headless(Language):
        def get_output_embeddings(self):
            return None

    assert only(Headless()).how == "the well-known name 'lm_head'"


def test_output_embeddings_that_are_several_say_nothing_of_which():
    class Several(Language):
        def get_output_embeddings(self):
            return self.heads

    model = Several()
    model.heads = nn.ModuleList([nn.Linear(6, 11), nn.Linear(6, 11)])
    assert only(model).name == "lm_head"


def test_output_embeddings_that_are_no_linear_layer_are_told_and_not_guessed_around():
    class Functional(Language):
        def get_output_embeddings(self):
            return self.embedding

    assert refusal(Functional(), "unembedding").startswith("layer 'embedding': expected a linear layer")


def test_a_single_output_has_no_vocabulary():
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "score": nn.Linear(6, 1)})
    assert not only(model).softmax
    assert not only(model, "score").softmax


def test_one_module_under_two_names_is_not_tied_to_itself():
    model = Language(tied=True)
    model.alias = model.lm_head
    assert only(model).tied_to == ("embedding.weight",)


def test_no_layers_leave_all_to_observe():
    found = find_sites(Language(), [])
    assert (found.sites, found.candidates, found.main, found.is_idle) == ((), (), "unembedding", False)


def test_a_layer_that_was_replaced_is_told_and_one_that_was_wrapped_is_not():
    model = Language()
    site = only(model)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)
    assert site.shape == (11, 6)
    model.lm_head = nn.Linear(6, 11)
    with pytest.raises(SiteError, match="layer 'lm_head': expected the Linear that was there when watch"):
        _ = site.shape
    model.lm_head = head
    assert site.shape == (11, 6)


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "unembed", "output_projection", "head", "classifier", "fc"])
def test_well_known_names(name):
    site = only(Language(name))
    assert (site.name, site.how) == (name, f"the well-known name '{name}'")
    assert only(nn.ModuleDict({"module": Language(name)})).name == f"module.{name}"


def test_names_that_are_common_inside_blocks_count_at_the_top_only():
    model = Language("readout")
    model.blocks[0]["fc"] = nn.Linear(6, 6)
    assert find_sites(model, "unembedding").sites == ()
    model.head = nn.Linear(6, 11)
    assert only(model).name == "head"


def test_two_of_one_well_known_name_decide_nothing():
    model = nn.ModuleDict({"a": Language(), "b": Language()})
    found = find_sites(model, "unembedding")
    assert found.sites == ()
    assert found.main == "unembedding"
    assert len(found.candidates) == 10


def test_otherwise_all_linear_layers_are_candidates():
    model = Language("readout")
    found = find_sites(model, "unembedding")
    assert [site.name for site in found.candidates] == [
        *(f"blocks.{i}.{way}" for i in range(2) for way in ("up", "down")),
        "readout",
    ]
    assert all(site.softmax and site.label == "unembedding" for site in found.candidates)
    assert found.candidates[0].how == "the last linear layer to run in the first forward"


def test_a_name_or_a_pattern_for_one_module():
    model = Language("readout")
    for layers in ("readout", "read*"):
        site = only(model, layers)
        assert (site.name, site.how, site.softmax) == ("readout", "named by the user", True)


def test_the_model_itself_may_be_the_layer():
    model = nn.Linear(6, 11)
    assert find_sites(model, "unembedding").candidates[0].module is model


def test_more_sites_by_pattern():
    model = Language()
    found = find_sites(model, ["unembedding", "blocks.*.up", "lm_head"])
    assert [(site.label, site.softmax) for site in found.sites] == [
        ("unembedding", True),
        ("blocks.0.up", False),
        ("blocks.1.up", False),
    ]
    assert found.sites[1].how == "matches 'blocks.*.up'"
    assert found.main == "unembedding"
    others = find_sites(model, ["blocks.1.*"])
    assert [site.label for site in others.sites] == ["blocks.1.up", "blocks.1.down"]
    assert others.main == "blocks.1.up"


def test_what_a_site_says_of_itself():
    site = only(Language(tied=True))
    assert site.description() == {
        "module": "lm_head",
        "kind": "Linear",
        "how": "the well-known name 'lm_head'",
        "softmax": True,
        "tied_to": ["embedding.weight"],
        "m": 11,
        "n": 6,
        "bias": False,
        "dtype": "float32",
    }
    assert site.sentence() == (
        "unembedding = 'lm_head', Linear 11 x 6, no bias, tied to embedding.weight: the well-known name 'lm_head'"
    )
    plain = find_sites(nn.Linear(6, 11).bfloat16(), "unembedding").candidates[0]
    assert plain.sentence() == (
        "unembedding = the model itself, Linear 11 x 6, with bias: the last linear layer to run in the first forward"
    )
    assert plain.description()["dtype"] == "bfloat16"


def refusal(model, layers, error=SiteError):
    with pytest.raises(error) as caught:
        find_sites(model, layers)
    return str(caught.value)


def test_an_unknown_name_lists_near_matches():
    assert refusal(Language(), "lm_haed") == (
        "layers='lm_haed': expected a module of Language, found none of that name; near matches: lm_head"
    )
    assert "near matches: blocks.0.up" in refusal(Language(), ["blocks.0.upp"])
    assert refusal(Language(), ["blocks.7.*"]).startswith("layers='blocks.7.*': expected a module of Language, found")


def test_a_pattern_for_one_module_that_matches_several():
    assert refusal(Language(), "blocks.*.up") == (
        "layers='blocks.*.up': expected one module, found 2 (blocks.0.up, blocks.1.up, ...); "
        "pass a list to watch several layers"
    )


def test_what_is_no_linear_layer():
    assert refusal(Language(), "embedding") == (
        "layer 'embedding': expected a linear layer with a floating-point weight [m, n], found Embedding ((11, 6)); "
        "name a torch.nn.Linear, or hand it over yourself, with watch(model, layers=[]) and monitor.observe(weight, "
        "inputs)"
    )
    assert "found LayerNorm ((6,))" in refusal(Language(), ["norm"])
    assert "found ModuleList (no weight)" in refusal(Language(), ["blocks"])
    assert refusal(Language(), ["nor*"]) == (
        "layers='nor*': expected linear layers, found that none of the matches is one"
    )


def test_a_model_without_a_linear_layer():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU())
    assert refusal(model, "unembedding") == (
        "Sequential: expected a model with a linear layer, found none among Conv1d, ReLU; name the module whose weight "
        "is the unembedding with layers='...', or hand it over yourself, with watch(model, layers=[]) and "
        "monitor.observe(weight, inputs)"
    )


def test_a_fan_in_of_one():
    model = nn.Sequential(nn.Linear(1, 4))
    assert refusal(model, "0") == "layer '0': expected fan-in n of at least 2, found weight (4, 1); log_n is undefined"
    assert "fan-in n of at least 2" in refusal(nn.ModuleDict({"lm_head": nn.Linear(1, 4)}), "unembedding")


@pytest.mark.parametrize("layers", [[3], 3, None, ["lm_head", None]])
def test_layers_that_are_no_names(layers):
    assert refusal(Language(), layers, InputError) == (
        f"layers: expected a module name, a pattern or a list of them, found {layers!r}"
    )


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_parametrized_weight_is_found_and_read_without_a_trace(parametrize):
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": parametrize(nn.Linear(8, 6)), "lm_head": parametrize(nn.Linear(6, 11))})
    model.train()
    model["lm_head"](torch.randn(3, 6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    site = only(model)
    find_sites(model, ["unembedding", "bod*"])
    assert site.shape == (11, 6)
    assert site.description()["kind"] == "ParametrizedLinear"
    weight = weight_of(model["lm_head"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(module.training for module in model.modules())
    inputs = torch.eye(6)
    model.eval()
    used = model["lm_head"](inputs) - model["lm_head"].bias
    torch.testing.assert_close(used, weight.T)
