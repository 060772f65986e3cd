"""Linear maps of modules of all kinds, against what the module's own forward makes of unit vectors."""

import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F
from torch.nn.utils import parametrizations

with warnings.catch_warnings():  # what these packages say of PyTorch as they are imported is not ours
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    import torchao.quantization as ao
    from peft import (
        AdaLoraConfig,
        IA3Config,
        LoHaConfig,
        LoraConfig,
        TrainableTokensConfig,
        VeraConfig,
        get_peft_model,
    )
    from transformers.pytorch_utils import Conv1D

from logalign.errors import SiteError
from logalign.torch.module_map import linear_map

M, N = 11_000, 128
"""More elements than one block has."""


class Net(nn.Module):
    def __init__(self, head=None, *, m=13, n=8):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(n, n)
        self.head = nn.Linear(n, m) if head is None else head

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))


def effective(module, n, *, inputs=None):
    """W [m, n] and b [m] as the module has them: what it makes of each unit vector, and of zero."""
    training = module.training
    module.eval()
    # With gradients, for bitsandbytes packs a weight for inference where there are none.
    zero = module(torch.zeros(1, n, requires_grad=True)).detach().double()
    W = (module(torch.eye(n, requires_grad=True)).detach().double() - zero).T
    module.train(training)
    return W, zero[0]


def assert_map_is(module, n, tolerance=1e-6):
    mapped = linear_map(module)
    W, b = effective(module, n)
    blocks = list(mapped.blocks())
    assert mapped.shape == tuple(W.shape) == (sum(len(block) for block in blocks), n)
    assert not any(block.requires_grad for block in blocks)
    torch.testing.assert_close(torch.cat(blocks).double(), W, rtol=0, atol=tolerance * (1 + W.abs().max()))
    bias = torch.zeros_like(b) if mapped.bias is None else mapped.bias.detach().double()
    torch.testing.assert_close(bias, b, rtol=0, atol=tolerance * (1 + b.abs().max()))
    return mapped


# Dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(bias):
    mapped = assert_map_is(nn.Linear(N, M, bias=bias), N)
    assert (mapped.what, mapped.exact) == (None, True)
    assert len(list(mapped.blocks())) > 1


def test_conv1d_of_transformers_keeps_its_weight_the_other_way_around():
    layer = Conv1D(13, 8)
    nn.init.normal_(layer.bias)
    mapped = assert_map_is(layer, 8)
    assert mapped.parameter is layer.weight
    assert (mapped.what, mapped.exact) == ("kept as [n, m]", True)


def test_a_parametrized_layer():
    assert assert_map_is(parametrizations.weight_norm(nn.Linear(8, 13)), 8).exact


class Doubling(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, inputs):
        scores = F.linear(inputs, self.weight).softmax(-1)
        return scores, scores.topk(2)


@pytest.mark.parametrize("module", [Doubling(8, 4), Router()], ids=["Doubling", "Router"])
def test_what_a_forward_of_ones_own_returns_is_not_looked_at(module):
    mapped = linear_map(module)
    assert torch.equal(torch.cat(list(mapped.blocks())), module.weight)
    inputs = torch.randn(3, 8)
    assert mapped.seen(inputs, module(inputs)) == (inputs, None)
    assert mapped.what == "with a forward of its own: E_Z from weight and inputs"


def test_a_compiled_module_is_the_module_within():
    layer = nn.Linear(8, 13)
    mapped = linear_map(torch.compile(layer, backend="eager"))
    assert mapped.parameter is layer.weight
    assert mapped.exact


def test_in_place_changes_change_the_version():
    layer = nn.Linear(8, 13)
    before = linear_map(layer).version
    with torch.no_grad():
        layer.weight.add_(1)
    assert linear_map(layer).version != before


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 8), nn.Bilinear(3, 4, 5), nn.LayerNorm((3, 4)), nn.BatchNorm1d(4), nn.ReLU()]
)
def test_what_is_no_linear_map(module):
    assert linear_map(module) is None
    assert linear_map(module.to("meta")) is None


# Convolutions ----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 5, 4), (2, 3, 11)),
    "1d, same": (nn.Conv1d(3, 5, 4, padding="same", dilation=2), (2, 3, 11)),
    "1 x 1": (nn.Conv2d(6, 5, 1, bias=False), (2, 6, 4, 3)),
    "2d": (nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 3, 7, 9)),
    "reflect": (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (2, 3, 7, 9)),
    "circular": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 7, 9)),
    "without a batch": (nn.Conv2d(3, 5, 3), (3, 7, 9)),
}


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_is_the_linear_map_of_its_patches(module, shape):
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs = module(inputs)
    mapped = linear_map(module)
    X, Z = mapped.seen(inputs, outputs)
    W = torch.cat(list(mapped.blocks()))
    m, n = mapped.shape
    assert (m, n) == (5, module.weight[0].numel())
    assert X.shape[-1] == n
    assert Z.shape == (*X.shape[:-1], m)
    torch.testing.assert_close(F.linear(X, W, module.bias), Z)
    assert sorted(Z.flatten().tolist()) == sorted(outputs.flatten().tolist())
    assert not X.requires_grad


# Adapters --------------------------------------------------------------------------------------------------------

# Transformers 5 tells PEFT of a name that is to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(config, head=None, **sizes):
    """A network with adapters on its head that are not as they begin; the wrapper of the head."""
    model = with_random_adapters(get_peft_model(Net(head, **sizes), config))
    return model, model.base_model.model.head


def with_random_adapters(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return model


LORA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.5},
}


def lora(**options):
    return LoraConfig(target_modules=["head"], r=4, lora_alpha=6, **options)


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_lora(options):
    _, head = adapted(lora(**options))
    base = linear_map(head.base_layer)
    mapped = assert_map_is(head, 8)
    assert mapped.parameter is head.base_layer.weight
    assert not torch.allclose(torch.cat(list(mapped.blocks())), torch.cat(list(base.blocks())), atol=0.1)
    assert mapped.exact == ("lora_dropout" not in options)
    assert linear_map(head.eval()).exact
    before = torch.cat(list(mapped.blocks()))
    head.merge()
    merged = assert_map_is(head, 8)
    assert merged.what is None
    torch.testing.assert_close(torch.cat(list(merged.blocks())), before)


def test_lora_over_several_blocks():
    _, head = adapted(lora(), m=M, n=N)
    mapped = assert_map_is(head, N)
    assert len(list(mapped.blocks())) > 1


def test_what_is_said_of_lora():
    assert linear_map(adapted(lora())[1]).what == "with LoRA: 'default' of rank 4"
    assert linear_map(adapted(lora(use_dora=True, lora_dropout=0.25))[1]).what == (
        "with LoRA with DoRA: 'default' of rank 4 and dropout 0.25, left out"
    )


def test_only_active_adapters_count():
    model, head = adapted(lora())
    model.add_adapter("second", lora(use_rslora=True))
    nn.init.normal_(head.lora_B["second"].weight)
    first = torch.cat(list(assert_map_is(head, 8).blocks()))
    model.base_model.set_adapter(["default", "second"])
    both = assert_map_is(head, 8)
    assert both.what == "with LoRA: 'default' of rank 4, 'second' of rank 4"
    assert not torch.allclose(torch.cat(list(both.blocks())), first)
    with model.disable_adapter():
        assert torch.equal(torch.cat(list(assert_map_is(head, 8).blocks())), head.base_layer.weight)


def test_lora_on_a_conv1d_of_transformers():
    _, head = adapted(LoraConfig(target_modules=["head"], r=4, fan_in_fan_out=True), Conv1D(13, 8))
    assert assert_map_is(head, 8).what == "kept as [n, m], with LoRA: 'default' of rank 4"


def test_an_update_of_an_adapter_changes_the_version():
    _, head = adapted(lora(use_dora=True))
    before = linear_map(head).version
    with torch.no_grad():
        head.lora_magnitude_vector["default"].weight.mul_(2)
    assert linear_map(head).version != before


@pytest.mark.parametrize("feedforward", [[], ["head"]], ids=["outputs", "inputs"])
def test_ia3(feedforward):
    _, head = adapted(IA3Config(target_modules=["head"], feedforward_modules=feedforward))
    mapped = assert_map_is(head, 8)
    assert mapped.exact
    assert mapped.what == f"with (IA)^3: 'default' on its {'inputs' if feedforward else 'outputs'}"


def test_modules_to_save():
    model, head = adapted(LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    mapped = assert_map_is(head, 8)
    assert mapped.parameter is head.modules_to_save["default"].weight
    assert (mapped.what, mapped.exact) == (None, True)
    with model.disable_adapter():
        assert linear_map(head).parameter is head.original_module.weight


@pytest.mark.parametrize("sizes", [{}, {"m": M, "n": N}], ids=["", "several blocks"])
def test_trainable_tokens(sizes):
    last = sizes.get("m", 13) - 1
    model, head = adapted(TrainableTokensConfig(target_modules=["head"], token_indices=[last, 2, 5]), **sizes)
    mapped = assert_map_is(head, sizes.get("n", 8))
    assert mapped.what == "with 3 trainable rows"
    assert mapped.exact
    assert mapped.bias is None
    with model.disable_adapter():
        assert torch.equal(torch.cat(list(linear_map(head).blocks())), head.base_layer.weight)


UNKNOWN_ADAPTERS = {
    "loha.Linear": LoHaConfig(target_modules=["head"]),
    "vera.Linear": VeraConfig(target_modules=["head"], r=4),
    "adalora.SVDLinear": AdaLoraConfig(target_modules=["head"], total_step=10),
}


@pytest.mark.parametrize(("name", "config"), UNKNOWN_ADAPTERS.items(), ids=UNKNOWN_ADAPTERS.keys())
def test_other_adapters_are_refused_by_name(name, config):
    _, head = adapted(config)
    assert refusal(head) == (
        "expected an adapter that is known (LoRA, DoRA, (IA)^3, trainable tokens, modules_to_save), found PEFT's "
        f"{name}; {OBSERVE}"
    )


def test_two_adapters_with_dora_are_refused():
    model, head = adapted(lora(use_dora=True))
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    assert refusal(head) == (
        "expected plain LoRA adapters, or a single one with DoRA, found adapter 'default' of DoraLinearVariant among 2 "
        f"that are active; {OBSERVE}"
    )


# Quantized -------------------------------------------------------------------------------------------------------

FOUR_BITS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nested": {"quant_type": "nf4", "compress_statistics": True},
    "stored as bfloat16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
}


def with_normal_weight(layer):
    """Of one norm a row, scales that are mixed up would not show."""
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    return layer.to("cpu").train()


def four_bits(n=64, m=13, **options):
    return with_normal_weight(bnb.nn.Linear4bit(n, m, **{"quant_type": "nf4", **options}))


def eight_bits(n=64, m=13, **options):
    return with_normal_weight(bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, **options))


@pytest.mark.parametrize("options", FOUR_BITS.values(), ids=FOUR_BITS.keys())
@pytest.mark.parametrize(("m", "n"), [(13, 64), (M, N)])
def test_four_bits_of_bitsandbytes(options, m, n):
    layer = four_bits(n, m, **options)
    mapped = assert_map_is(layer, n)
    assert mapped.what == f"of 4 bits ({options['quant_type']}, bitsandbytes)"
    assert mapped.exact
    assert len(list(mapped.blocks())) == (2 if m == M else 1)


def test_four_bits_whose_scales_reach_over_the_ends_of_rows():
    mapped = assert_map_is(four_bits(96, M), 96)
    assert mapped.what == "of 4 bits (nf4, bitsandbytes), widened as a whole: 4.0 MiB at a reading"


@pytest.mark.parametrize(("m", "n"), [(13, 64), (M, N)])
def test_eight_bits_of_bitsandbytes(m, n):
    layer = eight_bits(n, m)
    before = torch.cat(list(linear_map(layer).blocks()))  # its forward moves the scales elsewhere
    mapped = assert_map_is(layer, n, tolerance=1e-3)
    assert torch.equal(torch.cat(list(mapped.blocks())), before)
    torch.testing.assert_close(before, layer.weight.data * layer.state.SCB[:, None] / 127)
    assert mapped.what == "of 8 bits (bitsandbytes), inputs as they are before rounding"
    assert not mapped.exact


def test_eight_bits_that_are_made_in_the_forward():
    layer = bnb.nn.Linear8bitLt(8, 13)
    mapped = linear_map(layer)
    assert torch.equal(torch.cat(list(mapped.blocks())), layer.weight)
    assert (mapped.what, mapped.exact) == ("rounded to 8 bits in its forward, measured before", False)


TORCHAO = {
    "int8": (ao.Int8WeightOnlyConfig(), "Int8Tensor"),
    "int8 inputs": (ao.Int8DynamicActivationInt8WeightConfig(), "Int8Tensor"),
    "int4": (
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "IntxUnpackedToInt8Tensor",
    ),
    "float8": (ao.Float8WeightOnlyConfig(), "Float8Tensor"),
}


def torchao_quantized(config, m=13, n=32):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(n, m))
    ao.quantize_(model, config)
    return model[0]


@pytest.mark.parametrize(("config", "name"), TORCHAO.values(), ids=TORCHAO.keys())
@pytest.mark.parametrize(("m", "n"), [(13, 32), (M, N)])
def test_torchao(config, name, m, n):
    layer = torchao_quantized(config, m, n)
    mapped = assert_map_is(layer, n, tolerance=1e-2 if config is TORCHAO["int8 inputs"][0] else 1e-6)
    assert torch.equal(torch.cat(list(mapped.blocks())), layer.weight.dequantize())
    assert mapped.what == f"quantized (torchao's {name}), inputs as they are before rounding"
    assert len(list(mapped.blocks())) == (2 if m == M else 1)


def test_what_cannot_be_cut_into_rows_is_widened_as_a_whole(monkeypatch):
    monkeypatch.setattr("logalign.torch.quantized.SLICED", ())
    layer = torchao_quantized(TORCHAO["int8"][0], M, N)
    mapped = assert_map_is(layer, N)
    assert mapped.what.endswith("before rounding, widened as a whole: 5.4 MiB at a reading")


@pytest.mark.parametrize("told", [False, True], ids=["", "as Transformers loads it"])
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_over_quantized_weights(bits, told):
    model = Net(four_bits() if bits == 4 else eight_bits(), n=64)
    setattr(model, f"is_loaded_in_{bits}bit", told)
    head = with_random_adapters(get_peft_model(model, lora())).base_model.model.head
    assert type(head).__name__ == (f"Linear{bits}bit" + "Lt" * (bits == 8) if told else "Linear")
    mapped = assert_map_is(head, 64, tolerance=1e-3 if bits == 8 else 1e-6)
    assert mapped.what.startswith(f"of {bits} bits (")
    assert mapped.what.endswith("with LoRA: 'default' of rank 4")
    assert mapped.exact == (bits == 4)


@pytest.fixture
def one_process_mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


# Refusals --------------------------------------------------------------------------------------------------------

OBSERVE = "hand it over yourself, with watch(model, layers=[]) and monitor.observe(weight, inputs)"
READABLE = (
    "expected a weight whose numbers can be read (floating point, a bitsandbytes or torchao quantization), found "
)


def refusal(module):
    with pytest.raises(SiteError) as caught:
        linear_map(module)
    return str(caught.value)


def with_weight(weight):
    layer = nn.Linear(8, 13)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Packed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs)


class PackedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(1, 13, dtype=torch.int32))


def test_types_that_are_not_known_are_refused_by_name():
    plain = torch.randn(13, 8)
    assert refusal(with_weight(torch.zeros(52, 1, dtype=torch.uint8))) == (
        f"{READABLE}Linear with a weight of torch.uint8; {OBSERVE}"
    )
    assert "found Linear with a weight of torch.float8_e4m3fn;" in refusal(with_weight(plain.to(torch.float8_e4m3fn)))
    layer = nn.Linear(8, 13)
    del layer.weight
    layer.weight = plain.as_subclass(Packed)
    assert refusal(layer).startswith(f"{READABLE}Linear with a weight of type ")
    assert "Packed;" in refusal(layer)
    assert "PackedLinear with a packed qweight;" in refusal(PackedLinear())


def test_a_plain_subclass_of_parameter_is_known():
    class Named(nn.Parameter):
        pass

    layer = nn.Linear(8, 13)
    layer.weight = Named(torch.randn(13, 8))
    assert_map_is(layer, 8)


def test_not_quantized_yet():
    assert refusal(bnb.nn.Linear4bit(8, 13)) == (
        "expected a bitsandbytes's Linear4bit that is quantized, found one that is not yet; move the model to its "
        "device before watch(), which quantizes it"
    )
    assert "Linear8bitLt that is quantized, found one" in refusal(bnb.nn.Linear8bitLt(8, 13, has_fp16_weights=False))


def test_four_bits_that_were_packed_for_inference():
    layer = four_bits(128, 64)
    rows = torch.cat(list(linear_map(layer).blocks()))
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    layer.train()
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        return  # a CPU for which bitsandbytes has no such form
    with pytest.raises(SiteError, match=r"expected 4-bit weights in rows, found them packed for inference on a CPU"):
        list(linear_map(layer).blocks())
    layer.state_dict()
    # The scales have been rounded to bfloat16 by then.
    torch.testing.assert_close(torch.cat(list(linear_map(layer).blocks())), rows, rtol=1e-2, atol=0)


@pytest.mark.parametrize("module", [nn.Linear(8, 13), nn.Conv2d(3, 5, 3)], ids=["Linear", "Conv2d"])
def test_a_weight_on_the_meta_device(module):
    assert refusal(module.to("meta")) == (
        f"expected a weight that is in memory, found {type(module).__name__} on the meta device; make or load its "
        f"weights before watch(); if it is offloaded between forwards, {OBSERVE}"
    )


@pytest.mark.parametrize("shape", [(0,), (0, 8)])
def test_an_empty_weight(shape):
    assert refusal(with_weight(torch.empty(shape))) == (
        f"expected a weight [m, n] that is in memory, found Linear with an empty one {shape}; {OBSERVE}"
    )
    assert linear_map(nn.LayerNorm(0)) is None


def test_an_adapter_over_a_weight_that_is_split_over_ranks(one_process_mesh):
    _, head = adapted(lora())
    head.base_layer.weight = nn.Parameter(distribute_tensor(head.base_layer.weight.detach(), one_process_mesh))
    with pytest.raises(
        SiteError, match="expected an adapted weight that is whole when its layer runs, found a DTensor"
    ):
        list(linear_map(head).blocks())


@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 4, 3, groups=2), nn.Conv3d(3, 5, 3), nn.ConvTranspose2d(3, 5, 3)], ids=lambda m: str(m)[:9]
)
def test_convolutions_that_are_no_linear_map_of_patches(module):
    assert refusal(module) == (
        "expected a Conv1d or Conv2d with groups=1, which is one linear map of its patches, found "
        f"{type(module).__name__} with groups={module.groups}; {OBSERVE}"
    )
