"""What the ranks of a test do: a few steps of a small GPTModel of Megatron-core, parallelized in many ways.

Megatron-core is made for GPUs. What it needs of one is given here: its layers' own device is the CPU, its random
numbers are those of the process (all dropout is 0), and where only Transformer Engine has a layer (normalization under
sequence parallelism, attention under context parallelism) there is a plain one. The output layer, the embedding, the
loss, the linear layers and all process groups are Megatron's own.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import logalign
from logalign.integrations import megatron

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron-core's own imports tell
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, PADDED, WIDTH, LENGTH, BATCH, STEPS = 61, 64, 16, 8, 8, 3
"""As many sequences as tokens in one: a mask whose axes are mixed up has the right shape."""
Result = dict[str, Any]


class Norm(nn.LayerNorm):
    """A layer normalization whose gradients are summed under sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class Gathered(torch.autograd.Function):
    """A tensor of all context-parallel ranks, one after the other; each gets the gradient of its own part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        """[s, ...] to [ranks x s, ...]."""
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum over ranks, of the own part."""
        group = parallel_state.get_context_parallel_group()
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]


class Attention(nn.Module):
    """Causal attention over context-parallel ranks, each of which has consecutive tokens."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[s, b, heads, features] each, to [s, b, heads x features]."""
        group = parallel_state.get_context_parallel_group()
        key, value = Gathered.apply(key), Gathered.apply(value)
        first = group.rank() * query.shape[0]
        seen = torch.arange(key.shape[0]) <= torch.arange(first, first + query.shape[0])[:, None]
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).permute(2, 0, 1, 3).flatten(2)


class Float16Module(nn.Module):
    """A wrapper as Megatron's own are: it holds the model as `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.module(*args, **kwargs)


@contextlib.contextmanager
def groups(*, tp: int = 1, pp: int = 1, cp: int = 1) -> Iterator[None]:
    """Megatron's process groups, and the CPU for its device."""
    on_gpu = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    random.initialize_rng_tracker(inference_rng_tracker=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.cuda.current_device = on_gpu


def model_of(
    *, tied: bool = False, sequence_parallel: bool = False, gather: bool = False, mtp: int | None = None
) -> GPTModel:
    """This rank's chunk of the model at the start of training."""
    tp, cp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Apex is not here
        config = TransformerConfig(
            num_layers=2,
            hidden_size=WIDTH,
            num_attention_heads=2,
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            pipeline_dtype=torch.float32,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=sequence_parallel,
            mtp_num_layers=mtp,
        )
        layer = get_gpt_layer_local_spec(normalization="LayerNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        layer.submodules.self_attention.submodules.core_attention = Attention
        spec = TransformerBlockSubmodules(layer_specs=[layer] * (2 // pp), layer_norm=Norm)
        extra = {}
        if mtp is not None:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

            extra = {"mtp_block_spec": get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)}
        model = GPTModel(
            config,
            spec,
            vocab_size=PADDED,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=tied,
            parallel_output=not gather,
            **extra,
        )
    _fill(model, rank=parallel_state.get_tensor_model_parallel_rank(), ranks=tp)
    return model


def _fill(model: GPTModel, *, rank: int, ranks: int) -> None:
    """Weights that depend on the parameter's name in the whole model alone."""
    offset = parallel_state.get_pipeline_model_parallel_rank()
    for name, parameter in model.named_parameters():
        name = name.replace("decoder.layers.0", f"decoder.layers.{offset}") if offset else name
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        split = getattr(parameter, "tensor_model_parallel", False) and ranks > 1
        shape = list(parameter.shape)
        if split:
            shape[parameter.partition_dim] *= ranks
        whole = 0.1 + 0.3 * torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            whole += 1
        with torch.no_grad():
            parameter.copy_(whole.chunk(ranks, parameter.partition_dim)[rank] if split else whole)


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask [b, s]; the label of what does not count is 0, as Megatron has it."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.6).float()
    mask[1] = 0
    return ids, ids.roll(-1, 1) * mask.long(), mask


def of_this_rank(tensor: Tensor) -> Tensor:
    """The sequences of this data-parallel rank, and of them the tokens of this context-parallel one."""
    sequences = tensor.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    context = parallel_state.get_context_parallel_world_size()
    return sequences.chunk(context, 1)[parallel_state.get_context_parallel_rank()].contiguous()


def finish_gradients(model: GPTModel) -> None:
    """What Megatron does with the gradients once a backward is over."""
    tokens = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        torch.distributed.all_reduce(parameter.grad, group=tokens)


def train(
    rank: int,
    world: int,
    watched: bool = True,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    micro: int = 1,
    mask: str = "argument",
    wrapped: bool = False,
    **settings: Any,
) -> Result:
    """Train; the readings, the weights, and what was told."""
    with groups(tp=tp, pp=pp, cp=cp), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = model_of(**settings)
        whole = Float16Module(model) if wrapped else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        chunks = [whole]
        monitor = megatron.watch(chunks, vocabulary=VOCABULARY, every=1) if watched else None
        truths: list[float] = []
        if monitor is not None and world == 1:
            _truth(model, truths)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = None
            for part in zip(*(each.chunk(micro) for each in data(step)), strict=True):
                loss = _one(whole, part, data(step)[2], monitor, mask=mask, truths=truths)
            finish_gradients(model)
            optimizer.step()
            if monitor is not None:
                monitor.step(loss=loss)
        readings = [] if monitor is None else [asdict(taken.main) for taken in monitor.readings]
        sites = {} if monitor is None else monitor.sites
        if monitor is not None:
            monitor.close()
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {
        "readings": readings,
        "weights": weights,
        "sites": sites,
        "truths": truths,
        "told": [str(each.message) for each in told if "logalign" in str(each.message)],
    }


def _one(
    model: nn.Module, part: Any, whole_mask: Tensor, monitor: Any, *, mask: str, truths: list[float]
) -> Tensor | None:
    """A forward and backward over one micro-batch, from stage to stage."""
    ids, labels, counts = (of_this_rank(each) for each in part)
    first = parallel_state.get_context_parallel_rank() * ids.shape[1]
    positions = torch.arange(first, first + ids.shape[1]).expand_as(ids)
    extra = {"loss_mask": counts} if mask == "argument" else {}
    if mask == "monitor" and monitor is not None:
        monitor.mask(counts != 0)
    inner = model.module if hasattr(model, "module") else model
    before = None
    if not inner.pre_process:
        before = torch.empty(ids.shape[1], ids.shape[0], WIDTH)
        torch.distributed.recv(before, parallel_state.get_pipeline_model_parallel_prev_rank())
        inner.set_input_tensor(before.requires_grad_())
    _COUNTS.append(counts)
    output = model(ids, positions, None, labels=labels if inner.post_process else None, **extra)
    loss = None
    if inner.post_process:
        loss = (output * counts).sum() / whole_mask.sum()
        loss.backward()
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        loss = loss.detach() * ranks
    else:
        torch.distributed.send(output.detach(), parallel_state.get_pipeline_model_parallel_next_rank())
        gradient = torch.empty_like(output)
        torch.distributed.recv(gradient, parallel_state.get_pipeline_model_parallel_next_rank())
        output.backward(gradient)
    if before is not None:
        torch.distributed.send(before.grad, parallel_state.get_pipeline_model_parallel_prev_rank())
    return loss


_COUNTS: list[Tensor] = []


def _truth(model: GPTModel, truths: list[float]) -> None:
    """LAR by the public function, of what the last call of the output layer in a step sees."""

    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        weight = layer.weight if layer.weight is not None else kwargs["weight"]
        x = args[0].detach().double().transpose(0, 1)
        truths.append(logalign.lar(weight.detach().double()[:VOCABULARY], x, mask=_COUNTS[-1] != 0))

    model.output_layer.register_forward_hook(hook, with_kwargs=True)


def refused(rank: int, world: int, what: str) -> str:
    """The error of a wrong set-up."""
    with groups(tp=world):
        model = model_of()
        try:
            if what == "no output layer":
                megatron.watch(model.decoder)
            elif what == "two":
                megatron.watch([model, model_of()])
            elif what == "row-parallel":
                megatron.watch(model, layers=["*linear_fc2"])
            elif what == "vocabulary":
                megatron.watch(model, vocabulary=PADDED + 1)
            elif what == "tokens":
                megatron.watch(model, mesh=torch.distributed.group.WORLD, every=1)
                _one(model, data(0), data(0)[2], None, mask="argument", truths=[])
            elif what == "mask":
                monitor = megatron.watch(model, every=1)
                monitor.mask(torch.ones(LENGTH, BATCH // 2, dtype=torch.bool))
                ids, labels, _ = (each[: BATCH // 2] for each in data(0))
                model(ids, torch.arange(LENGTH).expand_as(ids), None, labels=labels)
        except logalign.errors.LogAlignError as error:
            return str(error)
    return "not refused"


def train_with(rank: int, world: int, watched: bool, settings: dict[str, Any]) -> Result:
    """`train`, with its keywords as one argument."""
    return train(rank, world, watched, **settings)
