"""The head is found by its name, or as the embedding that it is tied to; all else by patterns."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from logalign.checkpoints import spectra_of
from logalign.checkpoints.choice import OPTIMIZER
from logalign.errors import CheckpointError, InputError
from tests.checkpoints.conftest import gpt2, llama


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with weights [6, 4] of these names, and this config.json."""

    def make(*names, config=None, **others):
        save_file({name: np.eye(6, 4, dtype=np.float32) for name in names} | others, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("names", "head"),
    [
        (["lm_head.weight", "model.embed_tokens.weight"], "lm_head.weight"),
        (["output.weight", "layers.0.attention.output.weight"], "output.weight"),
        (["embed_out.weight", "gpt_neox.embed_in.weight"], "embed_out.weight"),
        (["model.module.lm_head.weight", "x.weight"], "model.module.lm_head.weight"),
        (["state_dict.model.fc.weight", "x.weight"], "state_dict.model.fc.weight"),
        (["language_model.lm_head.weight", "x.weight"], "language_model.lm_head.weight"),
        (["output_layer.weight", "fc.weight"], "output_layer.weight"),
    ],
)
def test_the_head_by_its_name(checkpoint, names, head):
    (found,) = spectra_of(checkpoint(*names)).weights
    assert (found.name, found.site) == (head, "unembedding")
    assert found.how == f"the well-known name '{head.split('.')[-2]}'"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"tie_word_embeddings": True}, "config.json says tie_word_embeddings"),
        ({"text_config": {"tie_word_embeddings": True}}, "config.json says tie_word_embeddings"),
        ({"architectures": ["GPT2LMHeadModel"]}, "no head is stored, and config.json says GPT2LMHeadModel"),
    ],
)
def test_the_embedding_that_the_head_is_tied_to(checkpoint, config, why):
    (found,) = spectra_of(checkpoint("transformer.wte.weight", "transformer.wpe.weight", config=config)).weights
    assert (found.name, found.site) == ("transformer.wte.weight", "unembedding")
    assert found.how == f"the embedding 'wte', which the head is tied to: {why}"


@pytest.mark.parametrize("config", [None, {}, {"tie_word_embeddings": False}, {"architectures": ["BertModel"]}])
def test_an_embedding_alone_is_no_head(checkpoint, config):
    folder = checkpoint("model.embed_tokens.weight", config=config)
    with pytest.raises(CheckpointError, match=r"expected a head \(lm_head.weight, .* with --layers, or take every one"):
        spectra_of(folder)
    (found,) = spectra_of(folder, layers=["*"]).weights
    assert found.site == "model.embed_tokens"


def test_a_packed_head_is_named(checkpoint):
    packed = np.zeros((6, 2), dtype=np.uint8)
    with pytest.raises(CheckpointError, match=r"found lm_head.weight \(6, 2\) of dtype U8"):
        spectra_of(checkpoint("x.weight", **{"lm_head.weight": packed}))


def test_patterns_take_names_with_and_without_weight(checkpoint):
    folder = checkpoint("a.0.up.weight", "a.1.up.weight", "a.0.down.weight", "lm_head.weight")
    names = [weight.name for weight in spectra_of(folder, layers=["a.*.up", "a.0.*.weight", "unembedding"]).weights]
    assert names == ["lm_head.weight", "a.0.down.weight", "a.0.up.weight", "a.1.up.weight"]
    assert spectra_of(folder, layers=["lm_*"]).weights[0].site == "unembedding"


def test_layers_are_in_the_order_of_their_numbers(checkpoint):
    folder = checkpoint(*(f"layers.{i}.{name}.weight" for i in (10, 2, 0) for name in ("b", "a")))
    sites = [weight.site for weight in spectra_of(folder, layers=["*"]).weights]
    assert sites == [f"layers.{i}.{name}" for i in (0, 2, 10) for name in ("a", "b")]


def test_a_pattern_that_matches_nothing_names_what_is_near(checkpoint):
    folder = checkpoint("layers.0.up_proj.weight", "layers.0.down_proj.weight", bias=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"'layers.0.up_porj', found none; near matches: layers.0.up_proj.weight"):
        spectra_of(folder, layers=["layers.0.up_porj"])
    with pytest.raises(
        CheckpointError, match=r"expected bias to be a floating-point matrix \[m, n\], found F64 \(3,\)"
    ):
        spectra_of(folder, layers=["bias"])


@pytest.mark.parametrize("layers", [[], [""], [3]])
def test_layers_that_are_no_patterns(checkpoint, layers):
    with pytest.raises(InputError, match="expected 'unembedding' or a list of patterns"):
        spectra_of(checkpoint("a.weight"), layers=layers)


def test_states_of_an_optimizer_are_left_out_and_counted(checkpoint):
    names = [f"{part}.x.weight" for part in OPTIMIZER]
    found = spectra_of(checkpoint("x.weight", *names, bias=np.zeros(3)), layers=["*"])
    assert [weight.name for weight in found.weights] == ["x.weight"]
    assert found.left_out == {"of an optimizer": len(names), "of other than two axes": 1}


def test_every_matrix_of_a_gpt2_is_out_by_in(saved):
    model = gpt2()
    found = {weight.name: weight for weight in spectra_of(saved(model), layers=["*"]).weights}
    assert found["transformer.h.0.attn.c_attn.weight"].is_transposed
    for name, weight in found.items():
        stored = model.state_dict()[name]
        is_conv1d = ".c_" in name
        assert weight.is_transposed == is_conv1d, name
        assert (weight.m, weight.n) == tuple(stored.T.shape if is_conv1d else stored.shape), name
        assert len(weight.p) == weight.n
    assert (found["transformer.h.0.mlp.c_proj.weight"].m, found["transformer.h.0.mlp.c_proj.weight"].n) == (16, 64)


def test_linear_layers_that_are_called_as_those_of_gpt2_are_as_they_stand(checkpoint):
    others = {"h.0.c_attn.weight": np.zeros((12, 4)), "h.0.c_fc.weight": np.zeros((16, 4))}
    found = spectra_of(checkpoint(**others), layers=["*"])
    assert [(weight.m, weight.n, weight.is_transposed) for weight in found.weights] == [(12, 4, False), (16, 4, False)]


def test_a_tied_llama_by_what_transformers_writes(saved):
    (found,) = spectra_of(saved(llama(tie_word_embeddings=True))).weights
    assert found.name == "model.embed_tokens.weight"
    (untied,) = spectra_of(saved(llama(tie_word_embeddings=False), "untied")).weights
    assert untied.name == "lm_head.weight"
