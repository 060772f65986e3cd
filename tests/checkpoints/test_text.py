"""LAR on a text is that of a plain loop over the same windows, with the same sums as `Energies.of`."""

import pytest
import torch

import logalign
from logalign import Energies
from logalign.checkpoints import spectra_of
from logalign.checkpoints.series import readings_of
from logalign.checkpoints.text import Text
from logalign.errors import CheckpointError, InputError
from tests.checkpoints.conftest import TEXT, gpt2, llama

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim")


@pytest.fixture
def folder(saved, tokenizer):
    def make(model):
        path = saved(model)
        tokenizer.save_pretrained(path)
        return path

    return make


def inputs_of(model, module, windows):
    """All inputs of a layer, [T, n] in float64."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)])
def test_the_head_is_measured_as_by_a_plain_loop(folder, text, tokenizer, make):
    model = make().eval()
    path = folder(model)
    found = spectra_of(path)
    measured = Text(file=text, tokens=150).through(path, found.weights)["unembedding"]
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:150])
    inputs = inputs_of(model, model.lm_head, ids.split(model.config.max_position_embeddings))
    weight = model.lm_head.weight.detach().double()
    truth, spectra = Energies.of(weight, inputs), logalign.spectra(weight, inputs)
    assert measured.energies.tokens == 150
    for form in FORMS:
        assert getattr(measured.energies, form) == pytest.approx(getattr(truth, form), rel=1e-5), form
    assert measured.input_participation == pytest.approx(spectra.input_participation, rel=1e-4)
    assert measured.coherence == pytest.approx(spectra.coherence, rel=1e-4)
    (head,) = found.weights
    assert measured.energies.lar <= head.lar_bound
    k = (head.participation * measured.input_participation) ** 0.5 / measured.coherence
    assert k == pytest.approx(truth.effective_dim, rel=1e-4), "the decomposition of k"


@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_linear_layer_is_measured_and_embeddings_are_not(folder, text, tokenizer, make):
    model = make().eval()
    path = folder(model)
    weights = spectra_of(path, layers=["*"]).weights
    measured = Text(file=text, tokens=100).through(path, weights)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][:100])
    windows = ids.split(model.config.max_position_embeddings)
    readings = {reading.site: reading for reading in readings_of(5, weights, measured)}
    assert len(readings) == len(weights)
    for site, reading in readings.items():
        name = "lm_head" if site == "unembedding" else site
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Embedding):
            assert (reading.lar, reading.reason) == (None, "no linear layer of the model has this weight")
            continue
        weight = module.weight.detach()
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        inputs = inputs_of(model, module, windows)
        assert reading.lar == pytest.approx(logalign.lar(weight.double(), inputs), rel=1e-5), site
        assert reading.lar <= reading.extra["lar_bound"]
        assert (reading.lar_centered is not None) == (site == "unembedding")


def test_weights_of_the_body_alone_are_found_in_the_model(folder, saved, text):
    path = folder(gpt2())
    body = spectra_of(saved(gpt2().transformer, "body"), layers=["h.0.mlp.c_fc"]).weights
    assert body[0].name == "h.0.mlp.c_fc.weight"
    assert set(Text(file=text, tokens=50).through(path, body)) == {"h.0.mlp.c_fc"}


def test_tokenizer_and_configuration_of_another_folder(saved, tokenizer, text, tmp_path):
    path = saved(llama())
    tokenizer.save_pretrained(tmp_path / "other")
    (path / "config.json").rename(tmp_path / "other" / "config.json")
    weights = spectra_of(path).weights
    with pytest.raises(CheckpointError, match=r"expected a tokenizer that Transformers loads from the disk"):
        Text(file=text).through(path, weights)
    measured = Text(file=text, model=tmp_path / "other", tokens=40).through(path, weights)
    assert measured["unembedding"].energies.tokens == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a text of 2 tokens or more, found 0"),
        (b"\xff\xfe\x00", "expected a text file in UTF-8"),
        (None, "expected a text file in UTF-8, found: .* No such file"),
    ],
)
def test_texts_that_are_none(folder, tmp_path, content, message):
    path = folder(llama())
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Text(file=tmp_path / "x.txt").through(path, spectra_of(path).weights)


def test_a_tokenizer_of_another_model(folder, text, tokenizer):
    tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer)
    path = folder(llama())
    tokenizer.add_tokens([f"<{i}>" for i in range(300)])
    tokenizer.save_pretrained(path)
    text.write_text("<299> " * 20)
    with pytest.raises(InputError, match="expected tokens below 290, the rows of the model's embedding, found 5"):
        Text(file=text).through(path, spectra_of(path).weights)


def test_missing_weights_are_not_made_up(folder, text):
    from safetensors.torch import load_file, save_file

    path = folder(llama())
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"found 1 missing .*\(model.layers.1.mlp.up_proj.weight\)"):
        Text(file=text, tokens=20).through(path, spectra_of(path).weights)


def test_code_that_comes_with_a_checkpoint_is_not_run(folder, text, tmp_path):
    import json

    path = folder(llama())
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(CheckpointError, match="without code of its own, found: "):
        Text(file=text, tokens=20).through(path, spectra_of(path).weights)
    assert not (tmp_path / "ran").exists()


def test_a_file_is_no_folder_of_transformers(folder, text):
    path = folder(llama())
    file = path / "model.safetensors"
    with pytest.raises(CheckpointError, match="expected a"):
        Text(file=text).through(file, spectra_of(file).weights)
    with pytest.raises(CheckpointError, match=r"config.json beside safetensors files\), found a file"):
        Text(file=text, model=path).through(file, spectra_of(file).weights)
