"""Losses that never form the logits: what is measured without them is what they would have given, on real text.

Liger's kernels are Triton's; without a GPU they are interpreted (tests/conftest.py).
"""

import argparse
import collections
import copy
import inspect
import re
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.liger import apply_liger_kernel

from logalign import Energies, open_run, watch
from logalign.errors import LogAlignWarning
from tests.torch import fused_cases, parallel_cases
from tests.torch.workers import Workers

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
VOCABULARY, WIDTH, BATCH, LENGTH = 300, 32, 2, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONLY_THE_LOSS = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": True}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text():
    """Source of the standard library as word numbers: those of its commonest words, 0 for all others."""
    words = re.findall(r"\w+|[^\w\s]", inspect.getsource(argparse))
    numbers = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common(VOCABULARY - 1), start=1)}
    return torch.tensor([numbers.get(word, 0) for word in words])


TEXT = text()


def batch(step):
    """Token numbers of some of the text, and labels of which a part does not count."""
    start = step * BATCH * LENGTH
    tokens = TEXT[start : start + BATCH * LENGTH].reshape(BATCH, LENGTH).to(DEVICE)
    ignored = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.3
    ignored[0, : LENGTH // 2] = True  # as a prompt is
    return tokens, torch.where(ignored.to(DEVICE), -100, tokens)


def counted(labels):
    """Which positions count, of unshifted labels."""
    return F.pad(labels[:, 1:] != -100, (0, 1), value=False)


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes})
    return LlamaForCausalLM(config).to(DEVICE).train()


def exact(model, tokens, mask):
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state.double()
    return Energies.of(model.get_output_embeddings().weight.detach().double(), hidden, mask=mask)


def assert_same(reading, energies, tolerance=1e-5):
    assert reading.tokens == energies.tokens
    for form in FORMS:
        assert getattr(reading, form) == pytest.approx(getattr(energies, form), abs=tolerance), form


def chunked(model, chunk=16):
    """Replace the forward by one that multiplies by the head's weight itself, chunk by chunk, as TRL's does."""

    def forward(self, input_ids=None, labels=None, shift_labels=None, logits_to_keep=0, **kwargs):
        hidden = self.base_model(input_ids, **kwargs).last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        weight = self.get_output_embeddings().weight
        losses = [
            F.cross_entropy(F.linear(x, weight), y, ignore_index=-100, reduction="sum")
            for x, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return sum(losses) / (targets != -100).sum()

    model.forward = types.MethodType(forward, model)
    return model


def liger(model):
    kernels = dict.fromkeys(set(inspect.signature(liger_of(model)).parameters) & {"swiglu", "geglu"}, False)
    apply_liger_kernel(model, {**ONLY_THE_LOSS, **kernels})
    return model


def liger_of(model):
    from liger_kernel.transformers import monkey_patch

    return getattr(monkey_patch, f"apply_liger_kernel_to_{model.config.model_type}")


needs_liger = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("liger_kernel") is None, reason="liger-kernel is for Linux"
)


# Transformers with Liger -----------------------------------------------------------------------------------------

FAMILIES = {
    "Llama": llama,
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)).to(DEVICE).train(),
}


@needs_liger
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES.keys())
def test_liger_gives_what_the_logits_give(build):
    """A training with Liger's loss beside one with logits, from the same weights."""
    torch.manual_seed(0)
    with_logits = build()
    without = liger(copy.deepcopy(with_logits))
    ran = []
    without.get_output_embeddings().register_forward_hook(lambda *_: ran.append(True))
    optimizer = torch.optim.AdamW(without.parameters(), lr=3e-3)
    with watch(with_logits, every=1) as reference, watch(without, every=1, without_logits="exact") as monitor:
        for step in range(4):
            tokens, labels = batch(step)
            with_logits.load_state_dict(without.state_dict())
            loss = with_logits(input_ids=tokens, labels=labels).loss
            expected = reference.step(loss=loss).main
            truth = exact(without, tokens, counted(labels))
            loss = without(input_ids=tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found = monitor.step(loss=loss).main
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
            assert_same(found, truth)
            assert found.kept == pytest.approx(counted(labels).float().mean().item())
            assert found.standard_errors is None
            for form in FORMS:
                assert getattr(found, form) == pytest.approx(getattr(expected, form), abs=1e-4)
        assert not ran
        described = monitor.sites["unembedding"]
    body = type(without.base_model).__name__
    assert described["inputs"] == f"the output of 'model' ({body})"
    assert described["mask"] == "forward argument 'labels' != -100, shifted by one"


@needs_liger
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_of_transformers_with_liger(tmp_path):
    """Two micro-batches a step, of which the loss is told how many tokens count in both."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = llama()
    steps = [[batch(2 * step + micro_batch) for micro_batch in range(2)] for step in range(2)]
    truths, readings = [], []

    class Watching(TrainerCallback):
        def on_step_begin(self, *_, **__):
            tokens, labels = (torch.cat(each) for each in zip(*steps[len(truths)], strict=True))
            truths.append(exact(model, tokens, counted(labels)))

        def on_step_end(self, *_, **__):
            readings.append(monitor.step().main)

    rows = [{"input_ids": x, "labels": y} for step in steps for each in step for x, y in zip(*each, strict=True)]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-2,
        use_liger_kernel=True,
        liger_kernel_config={**ONLY_THE_LOSS, "swiglu": False},
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        train_sampling_strategy="sequential",
    )
    with watch(model, every=1, without_logits="exact") as monitor:
        Trainer(model, arguments, train_dataset=rows, callbacks=[Watching()]).train()
        assert "inputs" in monitor.sites["unembedding"]
    for reading, truth in zip(readings, truths, strict=True):
        assert_same(reading, truth)


@needs_liger
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_liger_with_a_sample_is_within_three_standard_errors():
    model = liger(llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    errors = []
    with watch(model, every=1, without_logits=30) as monitor:
        for step in range(8):
            tokens, labels = batch(step)
            truth = exact(model, tokens, counted(labels))
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found = monitor.step(loss=loss).main
            assert found.tokens == truth.tokens
            for form in FORMS:
                error = found.standard_errors[form]
                assert abs(getattr(found, form) - getattr(truth, form)) <= 3 * error, form
            errors.append(found.standard_errors["lar"])
    assert 0.0002 < sum(errors) / len(errors) < 0.02


def trained(build, *, monitored, steps=4, **options):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = watch(model, every=2, spectra_every=2, **options) if monitored else None
    torch.manual_seed(1)
    for step in range(steps):
        tokens, labels = batch(step)
        loss = model(input_ids=tokens, labels=labels)
        loss = getattr(loss, "loss", loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(loss=loss)
    if monitor is not None:
        assert all(readings.main.lar is not None for readings in monitor.readings)
        assert all(readings.main.coherence is not None for readings in monitor.readings)
        monitor.close()
    return model.state_dict(), torch.random.get_rng_state()


TRAININGS = {
    "Liger": pytest.param(lambda: liger(llama(attention_dropout=0.1)), marks=needs_liger),
    "chunks": lambda: chunked(llama(attention_dropout=0.1)),
    "compiled": lambda: torch.compile(chunked(llama()), backend="eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", TRAININGS.values(), ids=TRAININGS.keys())
def test_weights_are_bit_identical_with_and_without_the_monitor(build):
    torch._dynamo.reset()
    plain, rng = trained(build, monitored=False)
    for way in ("exact", 30):
        torch._dynamo.reset()
        watched, watched_rng = trained(build, monitored=True, without_logits=way)
        assert plain.keys() == watched.keys()
        for name in plain:
            assert torch.equal(plain[name], watched[name]), name
        assert torch.equal(rng, watched_rng)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_fused_head_of_trl():
    add_fused_lm_head = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
    model, (tokens, labels) = llama(), batch(0)
    add_fused_lm_head(model)
    with watch(model, every=1, without_logits="exact") as monitor:
        loss = model(input_ids=tokens, labels=labels, fused_lm_head=True).loss
        loss.backward()
        assert_same(monitor.step(loss=loss).main, exact(model, tokens, counted(labels)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters_in_the_body_and_a_head_that_is_trained_as_a_whole(saved):
    peft = pytest.importorskip("peft")
    base, (tokens, labels) = llama(), batch(0)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
    chunked(base)
    with watch(model, every=1) as monitor:
        model(input_ids=tokens, labels=labels).backward()
        assert_same(monitor.step().main, exact(base, tokens, counted(labels)))


# Which tokens count ----------------------------------------------------------------------------------------------


def test_labels_that_are_shifted_already():
    model, (tokens, labels) = chunked(llama()), batch(0)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    with watch(model, every=1) as monitor:
        model(tokens, shift_labels=shifted).backward()
        assert_same(monitor.step().main, exact(model, tokens, counted(labels)))
        assert monitor.sites["unembedding"]["mask"] == "forward argument 'shift_labels' != -100"


def test_the_mask_of_the_user():
    model, (tokens, labels) = chunked(llama()), batch(0)
    mask = torch.arange(LENGTH, device=DEVICE).expand(BATCH, LENGTH) % 5 == 2
    with watch(model, every=1) as monitor:
        monitor.mask(mask)
        model(tokens, labels=labels).backward()
        assert_same(monitor.step().main, exact(model, tokens, mask))


def test_only_the_last_tokens():
    model, (tokens, labels) = chunked(llama()), batch(0)
    mask = counted(labels)
    mask[:, :-9] = False
    with watch(model, every=1) as monitor:
        model(tokens, labels=labels[:, -9:], logits_to_keep=9).backward()
        reading = monitor.step().main
    assert_same(reading, exact(model, tokens, mask))
    assert reading.kept == mask.sum() / (9 * BATCH)


def test_micro_batches_pool_and_one_without_a_token_that_counts_adds_none():
    model = chunked(llama())
    batches = [batch(step) for step in range(3)]
    batches[1][1][:] = -100
    for way in ("exact", 30):
        with watch(model, every=1, without_logits=way) as monitor:
            for tokens, labels in batches:
                model(tokens, labels=labels)
            reading = monitor.step().main
        tokens, labels = (torch.cat(each) for each in zip(*batches, strict=True))
        truth = exact(model, tokens, counted(labels))
        assert reading.tokens == truth.tokens
        assert reading.lar == pytest.approx(
            truth.lar, abs=1e-5 if way == "exact" else 3 * reading.standard_errors["lar"]
        )


def test_nothing_counts():
    model, (tokens, labels) = chunked(llama()), batch(0)
    with watch(model, every=1, without_logits=30) as monitor:
        model(tokens, labels=torch.full_like(labels, -100))
        with pytest.warns(LogAlignWarning, match="no token: the mask keeps none"):
            reading = monitor.step().main
    assert (reading.lar, reading.tokens, reading.kept) == (None, 0, 0)


def test_padding_of_the_vocabulary_is_left_out():
    model, (tokens, labels) = chunked(llama()), batch(0)
    with watch(model, every=1, vocabulary=250) as monitor:
        model(tokens, labels=labels).backward()
        reading = monitor.step().main
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state.double()
    assert reading.m == 250
    assert_same(reading, Energies.of(model.lm_head.weight.detach()[:250].double(), hidden, mask=counted(labels)))


# What counts as training -----------------------------------------------------------------------------------------


@needs_liger
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_evaluation_and_generation_are_not_recorded():
    model, (tokens, labels) = liger(llama()), batch(0)
    with watch(model, every=1) as monitor:
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        with torch.no_grad():
            model(input_ids=tokens, labels=labels)
        model.generate(tokens[:1, :4], max_new_tokens=2, do_sample=False)
        model.eval()
        model(input_ids=tokens, labels=labels)
        model.train()
        reading = monitor.step().main
    assert_same(reading, exact(model, tokens, counted(labels)))
    assert reading.tokens_seen == BATCH * LENGTH


def test_a_forward_that_forms_its_logits_pools_with_one_that_does_not():
    model = llama()
    (first, first_labels), (second, second_labels) = batch(0), batch(1)
    plain, fused = model.forward, chunked(copy.copy(model)).forward.__func__
    with watch(model, every=1, without_logits="exact") as monitor:
        model(input_ids=first, labels=first_labels).loss.backward()
        model.forward = types.MethodType(fused, model)
        model(second, labels=second_labels).backward()
        model.forward = plain
        reading = monitor.step().main
    both = counted(torch.cat([first_labels, second_labels]))
    assert_same(reading, exact(model, torch.cat([first, second]), both))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of", ["blocks", "model"])
def test_a_recomputed_forward_counts_once(reentrant, of):
    model, (tokens, labels) = chunked(llama()), batch(0)
    if of == "blocks":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    trigger = torch.zeros((), requires_grad=True)  # the reentrant form needs an input with a gradient

    def forward(trigger, tokens, labels):
        return model(tokens, labels=labels) + trigger

    with watch(model, every=1, without_logits="exact") as monitor:
        for step in range(2):
            if of == "blocks":
                loss = model(tokens, labels=labels, use_cache=False)
            else:
                loss = checkpoint(forward, trigger, tokens, labels, use_reentrant=reentrant)
            loss.backward()
            reading = monitor.step().main
            assert_same(reading, exact(model, tokens, counted(labels)))
            assert reading.tokens_seen == (step + 1) * BATCH * LENGTH


# Compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = chunked(llama(), chunk=BATCH * LENGTH // 2)
    with watch(model, every=2, without_logits="exact") as monitor:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for step in range(3):
            tokens, labels = batch(step)
            compiled(tokens, labels=labels).backward()
            readings = monitor.step()
            if step % 2 == 0:
                assert_same(readings.main, exact(model, tokens, counted(labels)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# Models in which the inputs of the head are not what the body gives ------------------------------------------------


class FusedBert(BertForMaskedLM):
    def forward(self, input_ids, labels):
        hidden = self.cls.predictions.transform(self.bert(input_ids).last_hidden_state)
        return F.linear_cross_entropy(hidden.flatten(0, 1), self.cls.predictions.decoder.weight, labels.flatten())


def test_layers_between_body_and_head_are_named_and_nothing_is_measured():
    model, (tokens, labels) = FusedBert(BertConfig(**SIZES)).train(), batch(0)
    with watch(model, every=1) as monitor:
        for step in range(3):
            model(tokens.cpu(), labels.cpu())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert monitor.step().main.lar is None
            assert len(caught) == (step == 2)
    assert str(caught[0].message).endswith(
        "call monitor.observe(weight, inputs, mask=labels != -100) beside it; what 'cls.predictions', "
        "'cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm' make of the output of 'bert' is not "
        "known here"
    )


def test_a_body_of_another_width():
    model, (tokens, labels) = llama(), batch(0)
    model.lm_head = nn.Linear(WIDTH // 2, VOCABULARY, bias=False).to(DEVICE)

    def forward(self, input_ids, labels):
        hidden = self.model(input_ids).last_hidden_state[..., : WIDTH // 2]
        return F.linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())

    model.forward = types.MethodType(forward, model)
    with watch(model, every=1) as monitor:
        for _ in range(2):
            model(tokens, labels)
            assert monitor.step().main.lar is None
        model(tokens, labels)
        with pytest.warns(
            LogAlignWarning, match=r"'model' \(LlamaModel\), which has 32 features, becomes its inputs, which have 16"
        ):
            assert monitor.step().main.lar is None


def test_logits_to_keep_as_a_tensor_is_not_guessed():
    model, (tokens, labels) = chunked(llama()), batch(0)
    kept = torch.tensor([1, 5, 7], device=DEVICE)
    with watch(model, every=1) as monitor:
        for _ in range(2):
            model(tokens, shift_labels=labels[:, kept], logits_to_keep=kept)
            monitor.step()
        model(tokens, shift_labels=labels[:, kept], logits_to_keep=kept)
        with pytest.warns(LogAlignWarning, match="a tensor as logits_to_keep"):
            assert monitor.step().main.lar is None


def test_a_projection_inside_of_the_body():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=WIDTH,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        dropout=0.0,
    )
    model, (tokens, labels) = chunked(OPTForCausalLM(config).to(DEVICE).train()), batch(0)
    with watch(model, every=1) as monitor:
        model(tokens, labels=labels)
        reading = monitor.step().main
        assert reading.n == WIDTH
        assert_same(reading, exact(model, tokens, counted(labels)))


# Losses that are modules -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A model that has its loss in it, and a head of a name that says nothing."""

    def __init__(self, loss, *, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.loss = loss
        if not hasattr(loss, "linear"):
            self.readout = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.to(DEVICE)
        if tied:
            self.loss.linear.weight = self.embedding.weight

    def hidden(self, tokens):
        return self.last(torch.tanh(self.first(self.embedding(tokens))))

    def head(self):
        return self.loss.linear if hasattr(self.loss, "linear") else self.readout

    def exact(self, tokens, mask):
        with torch.no_grad():
            return Energies.of(self.head().weight.double(), self.hidden(tokens).double(), mask=mask)


class PyTorchs(Net):
    def forward(self, tokens, targets):
        return self.loss(self.hidden(tokens).flatten(0, 1), targets.flatten())


class Ligers(Net):
    def forward(self, tokens, targets):
        return self.loss(self.readout.weight, self.hidden(tokens).flatten(0, 1), target=targets.flatten())


class CutCrossEntropys(Net):
    def forward(self, tokens, targets):
        return self.loss(self.hidden(tokens), self.readout.weight, targets)


def pytorchs(**options):
    loss = getattr(nn, "LinearCrossEntropyLoss", None)
    if loss is None:
        pytest.skip("PyTorch before 2.13 has no LinearCrossEntropyLoss")
    return loss(WIDTH, VOCABULARY, **options)


def ligers():
    return pytest.importorskip("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()


def cut_cross_entropys(**options):
    return pytest.importorskip("cut_cross_entropy").LinearCrossEntropy(impl="torch_compile", **options)


MODULES = {
    "PyTorch": lambda: PyTorchs(pytorchs()),
    "PyTorch, in chunks": lambda: PyTorchs(pytorchs(options=nn.LinearCrossEntropyOptions())),
    "PyTorch, tied, with a bias": lambda: PyTorchs(pytorchs(bias=True), tied=True),
    "Liger": lambda: Ligers(ligers()),
    "cut-cross-entropy": lambda: CutCrossEntropys(cut_cross_entropys()),
    "cut-cross-entropy, shifting": lambda: CutCrossEntropys(cut_cross_entropys(shift=True)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())
def test_losses_that_are_modules(build):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with watch(model, every=1, without_logits="exact") as monitor:
        for step in range(3):
            tokens, targets = batch(step)
            mask = counted(targets) if getattr(model.loss, "shift", False) else targets != -100
            truth = model.exact(tokens, mask)
            loss = model(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_same(monitor.step(loss=loss).main, truth)
        site = monitor.sites["unembedding"]
        name = type(model.loss).__name__
        assert site["module"] == ("loss.linear" if hasattr(model.loss, "linear") else "readout")
        assert (site["inputs"], site["mask"]) == (f"the arguments of {name}", f"targets of {name}")


def test_a_loss_with_probabilities_and_one_with_several_targets_to_an_input():
    tokens, targets = batch(0)
    probabilities = torch.rand(BATCH * LENGTH, VOCABULARY, device=DEVICE).softmax(-1)
    model = Net(pytorchs())
    with watch(model, every=1) as monitor:
        model.loss(model.hidden(tokens).flatten(0, 1), probabilities)
        assert_same(monitor.step().main, model.exact(tokens, None))
    model = Net(pytorchs(out_features=(2,)))
    targets = torch.stack([targets.flatten(), targets.flatten().roll(1)], dim=1)
    with watch(model, every=1) as monitor:
        model.loss(model.hidden(tokens).flatten(0, 1), targets)
        reading = monitor.step().main
        assert reading.m == 2 * VOCABULARY
        assert_same(reading, model.exact(tokens, (targets != -100).any(-1).reshape(tokens.shape)))


def test_a_loss_with_the_weight_of_another_layer_is_left_out():
    model = llama()
    model.loss = Ligers(ligers()).loss
    tokens, labels = batch(0)
    other = torch.randn(VOCABULARY, WIDTH, device=DEVICE, requires_grad=True)
    with watch(model, every=1) as monitor:
        model(input_ids=tokens, labels=labels).loss.backward()
        model.loss(other, torch.randn(5, WIDTH, device=DEVICE), torch.zeros(5, dtype=torch.long, device=DEVICE))
        assert_same(monitor.step().main, exact(model, tokens, counted(labels)))


# Heads that are called in chunks, and plain functions ------------------------------------------------------------


class Titan(Net):
    """As torchtitan does it: the forward ends before the head, which the loss calls on one chunk after the other."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())
        self.lm_head = self.readout
        del self.readout

    def forward(self, tokens):
        return self.hidden(tokens)

    def head(self):
        return self.lm_head

    def chunked_loss(self, hidden, targets, chunks=5):
        pairs = zip(hidden.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True)
        return sum(self.loss(self.lm_head(x).flatten(0, 1), y.flatten()) for x, y in pairs)


def test_a_head_that_is_called_chunk_by_chunk_after_the_forward():
    model = Titan()
    with watch(model, every=1) as monitor:
        for step in range(2):
            mask = []
            for micro_batch in range(2):
                tokens, targets = batch(2 * step + micro_batch)
                mask.append(targets != -100)
                monitor.mask(mask[-1])
                model.chunked_loss(model(tokens), targets).backward()
            tokens = torch.cat([batch(2 * step)[0], batch(2 * step + 1)[0]])
            assert_same(monitor.step().main, model.exact(tokens, torch.cat(mask)))


def test_the_head_of_a_transformer_that_is_called_after_its_forward():
    """That its forward does not run inside of the model's looks as with a fused loss, until it does run."""
    model = llama()

    def forward(self, input_ids):
        return self.model(input_ids).last_hidden_state

    model.forward = types.MethodType(forward, model)
    with watch(model, every=1) as monitor:
        for step in range(2):
            tokens = torch.cat([batch(2 * step)[0], batch(2 * step + 1)[0]])
            for part in tokens.chunk(2):
                for chunk in model(part).chunk(3, dim=1):
                    model.lm_head(chunk).square().mean().backward(retain_graph=True)
            reading = monitor.step().main
            assert_same(reading, exact(model, tokens, None))
            assert "inputs" not in monitor.sites["unembedding"]


def functions():
    def liger_function(x, weight, y):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(x, weight, y)

    def cut_cross_entropy_function(x, weight, y):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(x, weight, y, impl="torch_compile")

    return {
        "PyTorch": (lambda x, weight, y: F.linear_cross_entropy(x, weight, y), None),
        "Liger": (liger_function, "liger_kernel"),
        "cut-cross-entropy": (cut_cross_entropy_function, "cut_cross_entropy"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize(("function", "package"), functions().values(), ids=functions().keys())
def test_a_plain_function_is_handed_to_observe(function, package):
    if package is not None:
        pytest.importorskip(package)
    model = Titan()
    with watch(model, every=1, without_logits="exact") as monitor:
        for step in range(2):
            tokens, targets = batch(step)
            hidden = model(tokens)
            function(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten()).backward()
            monitor.observe(model.lm_head.weight, hidden, mask=targets != -100)
            assert_same(monitor.step().main, model.exact(tokens, targets != -100))


def test_without_observe_the_user_is_told_by_the_third_step():
    model = Titan()
    with watch(model, every=1) as monitor:
        for step in range(3):
            tokens, targets = batch(step)
            F.linear_cross_entropy(model(tokens).flatten(0, 1), model.lm_head.weight, targets.flatten()).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert monitor.step().main.lar is None
            assert len(caught) == (step == 2)
    assert "call monitor.observe(weight, inputs, mask=labels != -100) beside it" in str(caught[0].message)


class Unnamed(Net):
    """A head that nothing tells, whose weight a plain function multiplies by."""

    def forward(self, tokens):
        return self.hidden(tokens)


def test_a_guess_that_may_be_wrong_is_told():
    model, (tokens, targets) = Unnamed(nn.CrossEntropyLoss()), batch(0)
    with watch(model, every=1) as monitor:
        F.linear_cross_entropy(model(tokens).flatten(0, 1), model.readout.weight, targets.flatten()).backward()
        with pytest.warns(LogAlignWarning) as told:
            monitor.step()
    assert [str(each.message) for each in told] == [
        "logalign: unembedding: taken to be 'last', the last linear layer to run in the first forward, but 'readout' "
        "(300 x 32) could follow it and did not run; if that is the unembedding, name it with watch(layers=...), and "
        "where a loss multiplies by its weight itself, "
        "call monitor.observe(weight, inputs, mask=labels != -100) beside it"
    ]
    with watch(model, every=1) as monitor:
        hidden = model(tokens)
        F.linear_cross_entropy(hidden.flatten(0, 1), model.readout.weight, targets.flatten()).backward()
        monitor.observe(model.readout.weight, hidden, mask=targets != -100)
        assert_same(monitor.step().main, model.exact(tokens, targets != -100))


# Over ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.mark.parametrize(
    "case", [fused_cases.ddp, fused_cases.fsdp, fused_cases.fsdp_resharding, fused_cases.tensor_parallel]
)
def test_two_ranks(two, case):
    truth, watched, unwatched = parallel_cases.alone(), two.run(case, True), two.run(case, False)
    for one, other in zip(watched, unwatched, strict=True):
        assert not one["told"]
        assert one["readings"] == watched[0]["readings"]
        for found, true in zip(one["readings"], truth["readings"], strict=True):
            found, true = found["unembedding"], true["unembedding"]
            assert (found["tokens"], found["kept"]) == (true["tokens"], true["kept"])
            for form in FORMS:
                assert found[form] == pytest.approx(true[form], rel=1e-5), form
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


# What is left behind ---------------------------------------------------------------------------------------------


def test_closing_leaves_no_hook_and_a_copy_records_nothing():
    model, (tokens, labels) = chunked(llama()), batch(0)
    model.lm_head.criterion = pytorchs()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with watch(model, every=1) as monitor:
        assert [len(module._forward_hooks) for module in model.modules()] != hooks
        twin = copy.deepcopy(model)
        twin.model(tokens)
        model(tokens, labels=labels)
        assert monitor.step().main.tokens == counted(labels).sum()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_errors_stand_in_the_run(tmp_path):
    model = chunked(llama())
    with watch(model, every=1, without_logits=30, run=tmp_path / "run") as monitor:
        for step in range(2):
            tokens, labels = batch(step)
            model(tokens, labels=labels)
            monitor.step()
        taken = [readings.main for readings in monitor.readings]
    run = open_run(tmp_path / "run")
    assert [reading.standard_errors for reading in run.readings] == [reading.standard_errors for reading in taken]
    assert list(run.columns()["lar_centered_error"]) == [reading.standard_errors["lar_centered"] for reading in taken]
    assert run.meta["sites"]["unembedding"]["inputs"] == "the output of 'model' (LlamaModel)"
