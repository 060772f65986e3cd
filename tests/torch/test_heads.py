"""Heads of real models under `watch`: which layer is found, and its LAR against the truth in float64.

The truth is `Energies.of` the weight that the head's own forward has, made of unit vectors, and the inputs that a hook
of the test's own sees.
"""

import contextlib
import copy
import warnings

import accelerate
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings():  # what these packages say of PyTorch as they are imported is not ours
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import torchao.quantization as ao
    from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

from logalign import Energies, watch
from logalign.errors import InputError, LogAlignWarning, SiteError

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
V, N = 50, 32
# Transformers 5 tells PEFT of a name that is to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tokens_of(seed=0, length=9):
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(seed))


def effective(module, n):
    """W [m, n] of a module: what it makes of each unit vector, less what it makes of zero; outside of training."""
    module = copy.deepcopy(module).eval()
    # With gradients, for bitsandbytes packs a weight for inference where there are none.
    rows = module(torch.cat([torch.eye(n), torch.zeros(1, n)]).requires_grad_()).detach().double()
    return (rows[:-1] - rows[-1]).T


@contextlib.contextmanager
def inputs_of(module):
    """What reaches a module meanwhile."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    yield seen
    handle.remove()


def read(
    model, *, head=None, site="unembedding", mask=None, weight=None, tolerance=1e-5, layers="unembedding", **batch
):
    """Watch one forward of a model, compare the reading with the truth; the site's description and the outputs."""
    model.train()
    with watch(model, every=1, layers=layers) as monitor:
        described = monitor.sites[site]
        module = model.get_submodule(described["module"])
        assert head is None or module is head
        with inputs_of(module) as seen:
            outputs = model(**batch)
        reading = monitor.step()[site]
    assert module._forward_hooks == {}
    X = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen]).double()
    W = effective(module, X.shape[-1]) if weight is None else weight.detach().double()
    assert (reading.m, reading.n) == (described["m"], described["n"]) == tuple(W.shape)
    exact = Energies.of(W, X, mask=None if mask is None else mask.flatten())
    assert reading.reason is None
    assert reading.tokens == exact.tokens
    for form in FORMS if described["softmax"] else ("lar", "lar_token_centered"):
        assert getattr(reading, form) == pytest.approx(getattr(exact, form), abs=tolerance), form
    return described, outputs, reading


def shifted(labels):
    """The tokens that count in a causal model: those that have a next one."""
    return F.pad(labels[:, 1:], (0, 1), value=-100) != -100


# Transformers ----------------------------------------------------------------------------------------------------

DECODER = {"vocab_size": V, "hidden_size": N, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = DECODER | {"intermediate_size": N, "num_key_value_heads": 2, "pad_token_id": 0}
MOE = LLAMA | {"num_experts_per_tok": 2}

FAMILIES = {
    "Llama": (LLAMA, "lm_head", False, False),
    "Llama, tied": (LLAMA | {"tie_word_embeddings": True}, "lm_head", True, False),
    "GPT2": (
        {
            "vocab_size": V,
            "n_embd": N,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "lm_head",
        True,
        False,
    ),
    # Its head has the width 16 of the embedding, not that of the hidden states.
    "OPT": (
        {**DECODER, "ffn_dim": N, "word_embed_proj_dim": 16, "max_position_embeddings": 16, "pad_token_id": 0},
        "lm_head",
        True,
        False,
    ),
    "Phi": (LLAMA, "lm_head", False, True),
    "Gemma2": (LLAMA | {"head_dim": 16, "final_logit_softcapping": 0.5}, "lm_head", True, False),
    "Cohere": (LLAMA | {"logit_scale": 0.0625}, "lm_head", True, False),
    "Granite": (LLAMA | {"logits_scaling": 8.0}, "lm_head", False, False),
    "Mixtral": (MOE | {"num_local_experts": 4}, "lm_head", False, False),
    "Qwen2": (LLAMA, "lm_head", False, False),
}


def model_of(family, **options):
    name = family.partition(",")[0]
    config = getattr(transformers, f"{name}Config")(**FAMILIES[family][0], **options)
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}LMHeadModel", None) or getattr(transformers, f"{name}ForCausalLM")
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # of a size that caps and scales show at, and biases that are not zero
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models(family):
    _, name, tied, bias = FAMILIES[family]
    model, tokens = model_of(family), tokens_of()
    described, outputs, reading = read(
        model, head=model.get_output_embeddings(), mask=shifted(tokens), input_ids=tokens, labels=tokens
    )
    assert described["module"] == name
    assert described["how"] == f"{type(model).__name__}.get_output_embeddings()"
    assert bool(described["tied_to"]) == tied
    assert described["bias"] == bias
    assert outputs.logits.shape == (2, 9, V)
    assert 0.3 < reading.lar < 1


AFTER = {
    "Gemma2": lambda Z: 0.5 * torch.tanh(Z / 0.5),
    "Cohere": lambda Z: 0.0625 * Z,
    "Granite": lambda Z: Z / 8.0,
}


@pytest.mark.parametrize("family", AFTER)
def test_the_map_is_measured_before_caps_and_scales(family):
    model, tokens = model_of(family), tokens_of()
    with inputs_of(model.lm_head) as seen:
        _, outputs, reading = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    Z = F.linear(seen[0], model.lm_head.weight)
    torch.testing.assert_close(outputs.logits, AFTER[family](Z))
    kept = shifted(tokens)
    energy = Z[kept].double().square().sum().item()
    assert reading.energies["output"] == pytest.approx(energy, rel=1e-5)
    assert outputs.logits[kept].double().square().sum().item() < 0.9 * energy


def test_bert_with_masked_tokens():
    config = transformers.BertConfig(**DECODER, intermediate_size=N, max_position_embeddings=16)
    torch.manual_seed(0)
    model, tokens = transformers.BertForMaskedLM(config), tokens_of()
    nn.init.normal_(model.cls.predictions.bias)
    labels = torch.where(torch.arange(9) % 3 == 0, tokens, -100)
    described, _, _ = read(model, mask=labels != -100, input_ids=tokens, labels=labels)
    assert described["module"] == "cls.predictions.decoder"
    assert described["bias"]
    assert described["tied_to"] == ["bert.embeddings.word_embeddings.weight"]


def test_t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=N, d_kv=16, d_ff=N, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model, tokens = transformers.T5ForConditionalGeneration(config), tokens_of()
    labels = torch.where(torch.arange(9) < 7, tokens, -100)
    described, _, _ = read(model, head=model.lm_head, mask=labels != -100, input_ids=tokens, labels=labels)
    assert "shared.weight" in described["tied_to"]


def test_bart_adds_its_bias_after_the_head():
    config = transformers.BartConfig(
        vocab_size=V, d_model=N, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=N, decoder_ffn_dim=N, max_position_embeddings=16,
        decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = transformers.BartForConditionalGeneration(config), tokens_of()
    model.final_logits_bias.fill_(3.0)
    described, _, _ = read(model, head=model.lm_head, mask=tokens != -100, input_ids=tokens, labels=tokens)
    assert "model.shared.weight" in described["tied_to"]
    assert not described["bias"]


def test_logits_to_keep_shrinks_inputs_and_outputs_alike():
    model, tokens = model_of("Llama"), tokens_of()
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[:, -1] = False  # it has no next token
    labels = tokens[:, -4:]
    # Transformers wants labels of as many tokens as logits are kept of.
    _, outputs, reading = read(model, mask=kept, input_ids=tokens, labels=labels, logits_to_keep=4)
    assert outputs.logits.shape == (2, 4, V)
    assert reading.tokens == 6


def test_packed_input_of_one_row():
    model, tokens = model_of("Qwen2"), tokens_of().reshape(1, -1)
    positions = torch.arange(9).repeat(2)[None]
    labels = torch.where(positions > 0, tokens, -100)
    read(model, mask=shifted(labels), input_ids=tokens, labels=labels, position_ids=positions)


# Adapters --------------------------------------------------------------------------------------------------------


def lora(**options):
    return LoraConfig(target_modules=["lm_head", "q_proj"], r=4, lora_alpha=6, **options)


def with_adapters(model, config):
    """A model with adapters that are not as they begin."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
    return model


ADAPTERS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "dropout": lora(lora_dropout=0.5),
    "ia3": IA3Config(target_modules=["lm_head", "q_proj"], feedforward_modules=["q_proj"]),
    "modules to save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "elsewhere": LoraConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("family", ["Llama", "Phi"], ids=["", "with a bias"])
def test_adapters_on_the_head(config, family):
    model, tokens = with_adapters(model_of(family), config), tokens_of()
    described, _, _ = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    assert described["module"] == "base_model.model.lm_head"
    assert described["how"] == "PeftModel.get_output_embeddings()"
    assert described["bias"] == (family == "Phi")


def test_a_bias_of_the_adapter():
    model, tokens = with_adapters(model_of("Phi"), lora(lora_bias=True)), tokens_of()
    read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)


def test_adapters_that_are_merged_or_disabled():
    model, tokens = with_adapters(model_of("Llama"), lora()), tokens_of()
    batch = {"mask": shifted(tokens), "input_ids": tokens, "labels": tokens}
    _, _, apart = read(model, **batch)
    model.merge_adapter()
    described, _, merged = read(model, **batch)
    assert merged.lar == pytest.approx(apart.lar, abs=1e-6)
    assert "weight" not in described
    with model.disable_adapter():
        _, _, disabled = read(model, **batch)
    assert abs(disabled.lar - merged.lar) > 0.01


def test_dropout_on_the_adapter_is_left_out_of_the_outputs():
    """The logits of a training forward have more energy than the map gives them: the noise of the dropout."""
    model, tokens = with_adapters(model_of("Llama"), lora(lora_dropout=0.5)), tokens_of()
    described, outputs, reading = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    assert described["weight"] == "with LoRA: 'default' of rank 4 and dropout 0.5, left out"
    energy = outputs.logits[shifted(tokens)].double().square().sum().item()
    assert energy > 1.05 * reading.energies["output"]


def test_ties_are_told_of_the_weight_below_the_adapter():
    plain = model_of("Llama, tied")
    with watch(plain) as monitor:
        assert monitor.sites["unembedding"]["tied_to"] == ["model.embed_tokens.weight"]
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = with_adapters(plain, lora())
    tokens = tokens_of()
    described, _, _ = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    assert described["tied_to"] == ["base_model.model.model.embed_tokens.weight"]
    assert described["weight"] == "with LoRA: 'default' of rank 4"


@pytest.mark.parametrize("config", [lora(), ADAPTERS["ia3"], ADAPTERS["modules to save"]], ids=["lora", "ia3", "save"])
def test_adapters_that_come_after_the_monitor_are_told(config):
    plain, tokens = model_of("Llama"), tokens_of()
    monitor = watch(plain, every=1)
    model = with_adapters(plain, config).train()

    def step():
        model(input_ids=tokens, labels=tokens)
        monitor.step()

    with pytest.raises(SiteError, match=r"expected the Linear that was there when watch.* was called, found peft's "):
        step()
    monitor.close()
    read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)


def test_adapters_elsewhere_may_come_after_the_monitor():
    plain, tokens = model_of("Llama"), tokens_of()
    with watch(plain, every=1) as monitor:
        model = with_adapters(plain, ADAPTERS["elsewhere"]).train()
        model(input_ids=tokens, labels=tokens)
        assert monitor.step().main.lar is not None


def test_another_head_in_its_place_is_told():
    model, tokens = model_of("Llama").train(), tokens_of()
    with watch(model, every=1) as monitor:
        model.lm_head = nn.Linear(N, V)
        with pytest.raises(SiteError) as caught:
            model(input_ids=tokens, labels=tokens)
        with pytest.raises(SiteError, match="found Linear in its place"):
            monitor.step()
    assert str(caught.value) == (
        "layer 'lm_head': expected the Linear that was there when watch() was called, found Linear in its place; "
        "add adapters and change layers first, then watch the model"
    )


class WithFunctionalLoss(transformers.LlamaForCausalLM):
    """As a fused loss does it: the head's forward never runs, its weight is taken from it."""

    def forward(self, input_ids, labels):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return F.cross_entropy(F.linear(hidden, self.lm_head.weight).flatten(0, 1), labels.flatten())


def test_a_loss_that_passes_by_the_adapters_is_told():
    """Liger's takes `lm_head.weight`, which with LoRA on the head is the base weight."""
    torch.manual_seed(0)
    plain, tokens = WithFunctionalLoss(transformers.LlamaConfig(**LLAMA)).train(), tokens_of()
    with watch(plain, every=1) as monitor:
        plain(input_ids=tokens, labels=tokens)
        assert monitor.step().main.lar is not None
    model = with_adapters(plain, lora()).train()
    with watch(model, every=1) as monitor:
        model(input_ids=tokens, labels=tokens)
        assert monitor.step().main.reason == (
            "no training forward reached this layer (1 in a loss that takes the weight without the adapters on it, "
            "which are not trained so)"
        )
    model.merge_adapter()
    with watch(model, every=1) as monitor:
        model(input_ids=tokens, labels=tokens)
        assert monitor.step().main.lar is not None


def test_an_unknown_adapter_is_refused_when_the_model_is_watched():
    model = get_peft_model(model_of("Llama"), LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(SiteError, match=r"layer 'base_model.model.lm_head': expected an adapter .* PEFT's loha.Linear"):
        watch(model)


def test_new_tokens_that_are_trained_in_a_tied_head():
    model = with_adapters(
        model_of("Llama, tied"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7, 3])
    )
    tokens = tokens_of()
    described, _, _ = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    assert described["weight"] == "with 2 trainable rows"


def test_a_tie_that_peft_keeps():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model, tokens = with_adapters(model_of("Llama, tied"), config), tokens_of()
    described, _, _ = read(model, mask=shifted(tokens), input_ids=tokens, labels=tokens)
    assert described["tied_to"] == ["base_model.model.model.embed_tokens.modules_to_save.default.weight"]


class Net(nn.Module):
    """A head whose name says nothing."""

    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, 64)
        self.body = nn.Linear(64, 64)
        self.readout = nn.Linear(64, V) if head is None else head

    def forward(self, input_ids):
        return self.readout(torch.tanh(self.body(self.embedding(input_ids))))


def test_the_last_layer_to_run_is_the_adapted_one_and_no_part_of_it():
    model = with_adapters(Net(), LoraConfig(target_modules=["readout", "body"], r=4)).train()
    with watch(model, every=1) as monitor:
        module = model.base_model.model.readout
        with inputs_of(module) as seen:
            model(tokens_of())
        reading = monitor.step().main
        assert monitor.sites["unembedding"]["module"] == "base_model.model.readout"
    exact = Energies.of(effective(module, 64), seen[0].double())
    for form in FORMS:
        assert getattr(reading, form) == pytest.approx(getattr(exact, form), abs=1e-5), form


def test_patterns_pass_over_the_parts_of_an_adapted_layer():
    model = with_adapters(Net(), LoraConfig(target_modules=["readout"], r=4))
    with watch(model, layers=["*readout*", "*body*"]) as monitor:
        assert list(monitor.sites) == ["base_model.model.readout", "base_model.model.body"]


# Quantized -------------------------------------------------------------------------------------------------------


def four_bits():
    return bnb.nn.Linear4bit(64, V, quant_type="nf4").to("cpu")


def eight_bits():
    return bnb.nn.Linear8bitLt(64, V, has_fp16_weights=False).to("cpu")


def torchao_quantized(config):
    model = nn.Sequential(nn.Linear(64, V))
    ao.quantize_(model, config)
    return model[0]


QUANTIZED = {
    "4 bits": four_bits,
    "8 bits": eight_bits,
    "torchao int8": lambda: torchao_quantized(ao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: torchao_quantized(
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    ),
    "torchao int8 inputs": lambda: torchao_quantized(ao.Int8DynamicActivationInt8WeightConfig()),
}


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED.keys())
@pytest.mark.parametrize("config", [None, LoraConfig(target_modules=["readout"], r=4)], ids=["", "lora"])
def test_quantized_heads(make, config):
    model = Net(make())
    quantized = model.readout
    if config is not None:
        model = with_adapters(model, config)
    name = "readout" if config is None else "base_model.model.readout"
    module = model.get_submodule(name)
    # Where the forward rounds its inputs, what it makes of unit vectors is not W to the last digit.
    if isinstance(quantized, bnb.nn.Linear8bitLt):
        W = quantized.weight.data.double() * (quantized.weight.SCB / 127)[:, None]
    elif isinstance(quantized, bnb.nn.Linear4bit):
        W = bnb.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state).double()
    else:
        W = quantized.weight.dequantize().double()
    if config is not None:
        lora = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        W = W + module.scaling["default"] * lora
    described, _, _ = read(model, head=module, layers=name, weight=W, input_ids=tokens_of())
    assert described["weight"]


def trained(*, monitored, make, config, steps=4):
    model = Net() if make is None else Net(make())
    if config is not None:
        torch.manual_seed(3)
        model = get_peft_model(model, config)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    name = "readout" if config is None else "base_model.model.readout"
    monitor = watch(model, every=1, layers=name, spectra_every=2) if monitored else None
    torch.manual_seed(1)
    for step in range(steps):
        tokens = tokens_of(step)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            assert monitor.step().main.lar is not None
    if monitor is not None:
        monitor.close()
    return model, torch.random.get_rng_state()


TRAININGS = {
    "lora": (None, LoraConfig(target_modules=["readout", "body"], r=4)),
    "lora with dropout": (None, LoraConfig(target_modules=["readout"], r=4, lora_dropout=0.3)),
    "dora": (None, LoraConfig(target_modules=["readout"], r=4, use_dora=True)),
    "ia3": (None, IA3Config(target_modules=["readout"], feedforward_modules=[])),
    "lora over 4 bits": (four_bits, LoraConfig(target_modules=["readout"], r=4)),
    "below 4 bits": (four_bits, None),
    "below 8 bits": (eight_bits, None),
    "below torchao int8": (QUANTIZED["torchao int8"], None),
}


@pytest.mark.parametrize(("make", "config"), TRAININGS.values(), ids=TRAININGS.keys())
def test_weights_are_bit_identical_with_and_without_the_monitor(make, config):
    plain, rng = trained(monitored=False, make=make, config=config)
    watched, watched_rng = trained(monitored=True, make=make, config=config)
    before, _ = trained(monitored=False, make=make, config=config, steps=0)
    changed = False
    for (name, one), two, three in zip(
        plain.named_parameters(), watched.parameters(), before.parameters(), strict=True
    ):
        one, two, three = (each.dequantize() if hasattr(each, "qdata") else each for each in (one, two, three))
        assert torch.equal(one, two), name
        changed |= not torch.equal(one, three)
    assert changed
    assert torch.equal(rng, watched_rng)


COMPILED = {
    "lora": (None, LoraConfig(target_modules=["readout"], r=4, lora_dropout=0.3)),
    "modules to save": (None, LoraConfig(target_modules=["body"], modules_to_save=["readout"])),
    "lora over 4 bits": (four_bits, LoraConfig(target_modules=["readout"], r=4)),
    "torchao int8": (QUANTIZED["torchao int8"], None),
}


@pytest.mark.parametrize(("make", "config"), COMPILED.values(), ids=COMPILED.keys())
def test_compiled_models_with_such_heads(make, config):
    model = Net() if make is None else Net(make())
    model = (model if config is None else with_adapters(model, config)).train()
    name = "readout" if config is None else "base_model.model.readout"
    with watch(model, every=1, layers=name) as monitor:
        model(tokens_of())
        eager = monitor.step().main
        torch.compile(model, backend="aot_eager")(tokens_of())
        assert monitor.step().main.lar == pytest.approx(eager.lar, abs=1e-6)


# Heads of other kinds, and other layers --------------------------------------------------------------------------


def test_a_classifier_of_sequences_measures_all_tokens_that_its_head_runs_on():
    config = transformers.LlamaConfig(**LLAMA, num_labels=3)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    described, _, reading = read(model, input_ids=tokens_of(), labels=torch.tensor([0, 2]))
    assert described["how"] == "the well-known name 'score'"
    assert described["softmax"]
    assert reading.tokens == 18


def test_the_user_says_which_tokens_a_classifier_decides_by():
    config = transformers.LlamaConfig(**LLAMA, num_labels=3)
    torch.manual_seed(0)
    model, tokens = transformers.LlamaForSequenceClassification(config).train(), tokens_of()
    last = torch.zeros(2, 9, dtype=torch.bool)
    last[:, -1] = True
    with watch(model, every=1) as monitor, inputs_of(model.score) as seen:
        monitor.mask(last)
        model(input_ids=tokens, labels=torch.tensor([0, 2]))
        reading = monitor.step().main
    exact = Energies.of(model.score.weight.double(), seen[0].double(), mask=last)
    assert reading.tokens == 2
    assert reading.lar == pytest.approx(exact.lar, abs=1e-5)


def test_a_reward_head_has_no_vocabulary_to_center():
    config = transformers.LlamaConfig(**LLAMA, num_labels=1)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    described, _, reading = read(model, input_ids=tokens_of(), labels=torch.tensor([0.5, -1.0]))
    assert (described["m"], described["n"], described["softmax"]) == (1, N, False)
    assert reading.lar_vocab_centered is None
    assert reading.lar_centered is None
    assert reading.effective_dim >= 1


class WithValueHead(nn.Module):
    """A language model beside a value head, as reinforcement learning has it."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = model_of("Llama")
        self.v_head = nn.ModuleDict({"dropout": nn.Dropout(0.1), "summary": nn.Linear(N, 1)})

    def forward(self, input_ids, labels):
        outputs = self.pretrained_model(input_ids=input_ids, labels=labels, output_hidden_states=True)
        return outputs, self.v_head["summary"](self.v_head["dropout"](outputs.hidden_states[-1]))


def test_a_value_head_beside_the_unembedding():
    model, tokens = WithValueHead(), tokens_of()
    batch = {"input_ids": tokens, "labels": tokens, "layers": ["unembedding", "v_head.summary"]}
    described, _, _ = read(model, mask=shifted(tokens), site="v_head.summary", **batch)
    assert (described["m"], described["softmax"]) == (1, False)
    described, _, _ = read(model, mask=shifted(tokens), **batch)
    assert described["module"] == "pretrained_model.lm_head"


class MultiToken(nn.Module):
    """One output layer for the next token and for the two after it; the main prediction first or last."""

    def __init__(self, *, main_first):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, N)
        self.blocks = nn.ModuleList(nn.Linear(N, N) for _ in range(3))
        self.lm_head = nn.Linear(N, V, bias=False)
        self.main_first = main_first

    def forward(self, tokens, labels):
        hidden, losses = self.embedding(tokens), []
        for depth, block in enumerate(self.blocks):
            hidden = torch.tanh(block(hidden))
            own = F.pad(labels[:, depth:], (0, depth), value=-100)
            losses.append((hidden, own))
        if not self.main_first:
            losses.reverse()
        logits = [(self.lm_head(hidden), own) for hidden, own in losses]
        return sum(F.cross_entropy(each.flatten(0, 1), own.flatten(), ignore_index=-100) for each, own in logits)


@pytest.mark.parametrize(("main_first", "main_call"), [(True, 0), (False, 2)], ids=["first", "last"])
def test_multi_token_prediction_counts_the_main_call_where_it_is_told(main_first, main_call):
    model, tokens = MultiToken(main_first=main_first).train(), tokens_of()
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    with watch(model, every=1, main_call=main_call) as monitor, inputs_of(model.lm_head) as seen:
        model(tokens, labels)
        model(tokens + 1 - tokens % 2, labels)  # a second micro-batch
        reading = monitor.step().main
    X = torch.cat([seen[main_call], seen[3 + main_call]]).double()
    exact = Energies.of(model.lm_head.weight.double(), X, mask=torch.cat([labels, labels]) != -100)
    assert reading.tokens == exact.tokens == 32
    for form in FORMS:
        assert getattr(reading, form) == pytest.approx(getattr(exact, form), abs=1e-5), form


def test_multi_token_prediction_is_seen_by_the_labels_and_told():
    model, tokens = MultiToken(main_first=True).train(), tokens_of()
    with watch(model, every=1) as monitor:
        model(tokens, tokens)
        with pytest.warns(LogAlignWarning) as caught:
            reading = monitor.step().main
    assert [str(each.message) for each in caught] == [
        "logalign: the unembedding was called 3 times in one forward, on more tokens than there are labels; all calls "
        "are counted: where the model predicts further tokens, too, pass watch(main_call=0), or which call is the main "
        "one"
    ]
    assert reading.tokens == 3 * 18


class Chunked(MultiToken):
    def forward(self, tokens, labels):
        hidden = self.embedding(tokens)
        parts = zip(hidden.split(4, 1), labels.split(4, 1), strict=True)
        return sum(
            F.cross_entropy(self.lm_head(each).flatten(0, 1), own.flatten(), reduction="sum") for each, own in parts
        )


def test_chunks_of_one_prediction_all_count():
    model, tokens = Chunked(main_first=True), tokens_of()
    _, _, reading = read(model, mask=None, tokens=tokens, labels=tokens)
    assert reading.tokens == 18


def test_heads_of_their_own_for_further_tokens_are_sites_by_name():
    model = MultiToken(main_first=True).train()
    model.heads = nn.ModuleList(nn.Linear(N, V) for _ in range(2))
    assert list(watch(model, layers=["unembedding", "heads.*"]).sites) == ["unembedding", "heads.0", "heads.1"]


@pytest.mark.parametrize("main_call", [-1, 1.0, True, "first"])
def test_a_main_call_that_is_none(main_call):
    with pytest.raises(InputError, match="main_call: expected None or a whole number from 0 on, found"):
        watch(Net(), main_call=main_call)


ROUTERS = {
    "Mixtral": (MOE | {"num_local_experts": 4}, "MixtralTopKRouter", "model.layers.0.mlp.gate"),
    "Qwen2Moe": (
        MOE | {"num_experts": 4, "moe_intermediate_size": N, "shared_expert_intermediate_size": N},
        "Qwen2MoeTopKRouter",
        "model.layers.0.mlp.gate",
    ),
    "GptOss": (MOE | {"num_local_experts": 4, "head_dim": 16}, "GptOssTopKRouter", "model.layers.0.mlp.router"),
}


@pytest.mark.parametrize(("family", "found"), ROUTERS.items(), ids=ROUTERS.keys())
def test_routers_as_extra_sites(family, found):
    options, kind, name = found
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model, tokens = getattr(transformers, f"{family}ForCausalLM")(config), tokens_of()
    router = model.get_submodule(name)
    nn.init.normal_(router.weight)
    described, _, _ = read(
        model,
        site=name,
        layers=["unembedding", "model.layers.*.mlp.gate" if "gate" in name else "model.layers.*.mlp.router"],
        mask=None,
        weight=router.weight,
        input_ids=tokens,
    )
    assert described["kind"] == kind
    assert described["weight"] == "with a forward of its own: E_Z from weight and inputs"


def test_the_outputs_of_a_router_are_not_sampled_by_default():
    options, _, name = ROUTERS["Mixtral"]
    torch.manual_seed(0)
    model, tokens = (
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**options)).train(),
        tokens_of(length=300),
    )
    router = model.get_submodule(name)
    nn.init.normal_(router.weight)
    with watch(model, layers=[name]) as monitor, inputs_of(router) as seen:
        model(input_ids=tokens)
        reading = monitor.step().main
    exact = Energies.of(router.weight.double(), seen[0].double())
    assert reading.tokens == 600
    assert reading.lar == pytest.approx(exact.lar, abs=1e-5)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_as_an_extra_site(kind):
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool1d(1) if kind is nn.Conv1d else nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(kind(3, 6, 3, padding=1, stride=2), nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 4)).train()
    images = torch.randn(5, 3, 8) if kind is nn.Conv1d else torch.randn(5, 3, 8, 9)
    with watch(model, every=1, spectra_every=1, layers=["unembedding", "0"]) as monitor:
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3, 0])).backward()
        readings = monitor.step()
        described = monitor.sites["0"]
    # Its own gradient tells the map: d(sum of z_o at one place) / d(weight of o) is the patch there.
    conv = model[0]
    places = conv(images).flatten(2)
    patches = torch.stack([
        torch.autograd.grad(conv(images).flatten(2)[b, 0, p], conv.weight)[0][0].flatten()
        for b in range(5) for p in range(places.shape[-1])
    ])  # fmt: skip
    exact = Energies.of(conv.weight.detach().flatten(1).double(), patches.double())
    reading = readings["0"]
    assert (reading.tokens, reading.n, reading.m) == (exact.tokens, exact.n, 6)
    assert reading.lar == pytest.approx(exact.lar, abs=1e-5)
    assert reading.lar_token_centered == pytest.approx(exact.lar_token_centered, abs=1e-5)
    assert reading.weight_participation > 1
    assert described["weight"].startswith("of patches 3 x 3")


# What cannot be measured -----------------------------------------------------------------------------------------


def test_a_head_on_the_meta_device_is_refused_at_once():
    with torch.device("meta"):
        model = model_of("Llama")
    with pytest.raises(
        SiteError, match="layer 'lm_head': expected a weight that is in memory, found Linear on the meta"
    ):
        watch(model)


def test_a_head_that_is_offloaded_between_forwards_is_refused_at_once():
    model = Net()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(
        SiteError, match=r"found Linear on the meta device; .* if it is offloaded between forwards, hand"
    ):
        watch(model, layers="readout")


def test_a_partitioned_head_that_nobody_gathers_is_told_when_it_runs():
    """As ZeRO-3 leaves a weight between forwards: empty, with the shape that it has when it is whole."""
    model = Net().train()
    weight = model.readout.weight
    weight.ds_shape = weight.shape
    whole, weight.data = weight.data, torch.empty(0)
    with watch(model, every=1, layers="readout") as monitor:
        assert (monitor.sites["unembedding"]["m"], monitor.sites["unembedding"]["n"]) == (V, 64)
        handles = [
            model.readout.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole)),
            model.readout.register_forward_hook(lambda *_: setattr(weight, "data", torch.empty(0))),
        ]
        model(tokens_of())
        assert weight.numel() == 0
        assert monitor.step().main.lar is not None
        handles.pop().remove()
        model.readout.register_forward_hook(lambda *_: setattr(weight, "data", torch.empty(0)), prepend=True)
        with pytest.raises(SiteError) as caught:
            model(tokens_of())
    assert str(caught.value) == (
        "layer 'readout': expected a weight (50, 64) that is whole while its layer runs, found it empty; gather it (as "
        "deepspeed.zero.GatheredParameters does) and hand it over yourself, with watch(model, layers=[]) and "
        "monitor.observe(weight, inputs)"
    )


def test_a_head_that_was_emptied_is_told_when_it_runs():
    model = Net().train()
    with watch(model, every=1, layers="readout") as monitor:
        weight = model.readout.weight.data
        model.readout.weight.data = torch.empty(0)
        with pytest.raises(
            SiteError, match=r"layer 'readout': expected a weight .m, n. that is in memory, found Linear"
        ):
            monitor.step()
        model.readout.weight.data = weight
        model(tokens_of())
        assert monitor.step().main.lar is not None


def test_an_unknown_quantization_of_the_head_is_refused_and_handed_over():
    model, tokens = model_of("Llama").train(), tokens_of()
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter((weight * 40).round().to(torch.int8), requires_grad=False)
    with pytest.raises(SiteError, match=r"layer 'lm_head': .* found Linear with a weight of torch.int8; hand it over"):
        watch(model)
    with watch(model, every=1, layers=[]) as monitor:
        hidden = model.model(input_ids=tokens).last_hidden_state
        monitor.observe(model.lm_head.weight / 40, hidden)
        reading = monitor.step().main
    exact = Energies.of(model.lm_head.weight.double() / 40, hidden.double().detach())
    assert reading.site == "unembedding"
    assert reading.lar == pytest.approx(exact.lar, abs=1e-5)
