"""What the ranks of a test do: a few steps of one small language model, parallelized in many ways, watched or not.

`alone` is the same training in one process that sees all tokens and the whole weight: the truth.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

import logalign

VOCABULARY, WIDTH, BATCH, LENGTH, STEPS = 53, 16, 8, 6, 4
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
SPECTRAL = ("weight_participation", "input_participation", "coherence")
Result = dict[str, Any]


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n] to [B, T, n]."""
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Embedding, two blocks, norm, head."""

    def __init__(self, *, bias: bool = False, padding: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY + padding, bias=bias)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, m]; labels are looked at by the monitor only."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def data(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T] of a step; the second quarter of the batch counts for nothing."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < 0.3] = -100
    labels[BATCH // 4 : BATCH // 2] = -100
    return ids, labels


def model_of(**settings: Any) -> Model:
    """The model at the start of training."""
    torch.manual_seed(7)
    model = Model(**settings)
    with torch.no_grad():
        model.lm_head.weight += 0.1
    return model


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def alone(layers: Any = "unembedding", spectra: bool = False, vocabulary: int | None = None, **settings: Any) -> Result:
    """The truth: one process, all tokens, the whole weight."""
    batches = [data(step) for step in range(STEPS)]
    return run(model_of(**settings), batches, 1.0, watched=True, layers=layers, spectra=spectra, vocabulary=vocabulary)


def run(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    *,
    watched: bool,
    layers: Any = "unembedding",
    mesh: Any = None,
    loss_context: Any = contextlib.nullcontext,
    after_backward: Any = None,
    micro: int = 1,
    folder: Path | None = None,
    spectra: bool = False,
    vocabulary: int | None = None,
) -> Result:
    """Train; readings by step and site, and the whole final weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    monitor = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if watched:
            spectra_every = 1 if spectra else 0
            monitor = logalign.watch(
                model,
                every=1,
                layers=layers,
                mesh=mesh,
                run=folder,
                spectra_every=spectra_every,
                vocabulary=vocabulary,
            )
        for ids, labels in batches:
            total = data_count(ids, labels, batches)
            optimizer.zero_grad()
            loss = torch.zeros(())
            for part_ids, part_labels in zip(ids.chunk(micro), labels.chunk(micro), strict=True):
                with loss_context():
                    logits = model(part_ids, labels=part_labels)
                    part = summed_loss(logits, part_labels) / total * scale
                    part.backward()
                loss = loss + (part.full_tensor() if isinstance(part, DTensor) else part).detach()
            if after_backward is not None:
                after_backward(model)
            optimizer.step()
            if monitor is not None:
                monitor.step(loss=loss)
    result: Result = {"weights": whole_weights(model), "told": [str(each.message) for each in told]}
    if monitor is not None:
        result["readings"] = [readings_of(each) for each in monitor.readings]
        result["verdict"] = monitor.verdict.outcome
        result["group"] = monitor._recorder.ranks.describe()
        monitor.close()
    return result


_COUNTS = [int((data(step)[1] != -100).sum()) for step in range(STEPS)]


def data_count(ids: Tensor, labels: Tensor, batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Tokens that count in the whole batch of this step, over all ranks."""
    step = next(i for i, (other, _) in enumerate(batches) if other is ids)
    return _COUNTS[step]


def readings_of(readings: Any) -> dict[str, Any]:
    """Plain numbers of one step's readings."""
    fields = (*FORMS, "tokens", "tokens_seen", "kept", "nonfinite", "reason", "m", "n", "loss", *SPECTRAL)
    return {site: {name: getattr(reading, name) for name in fields} for site, reading in readings.items()}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        found[name.removeprefix("module.")] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def rows_of(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's sequences of every step."""
    return [tuple(part.chunk(world)[rank] for part in data(step)) for step in range(STEPS)]  # type: ignore[misc]


def positions_of(rank: int, world: int, batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """This rank's positions of every sequence."""
    return [(ids.chunk(world, 1)[rank], labels.chunk(world, 1)[rank]) for ids, labels in batches]


def ddp(rank: int, world: int, watched: bool, folder: Path | None = None, micro: int = 1) -> Result:
    """DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(model_of())
    return run(model, rows_of(rank, world), world, watched=watched, folder=folder, micro=micro)


def fsdp_compiled(rank: int, world: int, watched: bool) -> Result:
    """Blocks compiled one by one, then sharded, as large trainings do it."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for unit in (*model.blocks, model.lm_head, model):
        fully_shard(unit)
    return run(model, rows_of(rank, world), world, watched=watched, layers=["unembedding", "blocks.*"])


def ddp_compiled(rank: int, world: int, watched: bool) -> Result:
    """The whole model compiled, then wrapped."""
    model = torch.compile(model_of(), backend="aot_eager")
    return run(nn.parallel.DistributedDataParallel(model), rows_of(rank, world), world, watched=watched)


def tensor_parallel_compiled(rank: int, world: int, watched: bool) -> Result:
    """A tensor-parallel model, compiled whole."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model = parallelized(model_of(), mesh, "gathered")
    model.compile(backend="aot_eager", fullgraph=True)
    return run(model, [data(step) for step in range(STEPS)], 1.0, watched=watched)


def collectives(rank: int, world: int, how: str) -> list[int]:
    """How many collectives the monitor adds to each of four steps, of which the first and the third are monitored."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for watched in (True, False):
        if how == "data":
            model: nn.Module = nn.parallel.DistributedDataParallel(model_of())
        else:
            mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
            model = parallelized(model_of(), mesh, "gathered")
        layers = ["unembedding", "*blocks.*.up"]
        monitor = logalign.watch(model, every=2, layers=layers) if watched else None
        found = []
        for step in range(STEPS):
            ids, labels = data(step)
            with CommDebugMode() as mode:
                summed_loss(model(ids, labels=labels), labels).backward()
                if monitor is not None:
                    monitor.step(loss=1.0)
            found.append(mode.get_total_counts())
        counts.append(found)
        if monitor is not None:
            monitor.close()
    return [with_monitor - without for with_monitor, without in zip(*counts, strict=True)]


def ddp_accumulating(rank: int, world: int, watched: bool) -> Result:
    """The same with two micro-batches a step."""
    return ddp(rank, world, watched, micro=2)


def fsdp(rank: int, world: int, watched: bool, reshard: bool = True, dtype: Any = None, units: bool = True) -> Result:
    """`fully_shard`, each block and the head a unit of its own, or the whole model one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, options = model_of(), {}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (world,))
    if units:
        for unit in (*model.blocks, model.lm_head):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)
    return run(model, rows_of(rank, world), world, watched=watched)


def fsdp_whole(rank: int, world: int, watched: bool) -> Result:
    """The whole model one unit."""
    return fsdp(rank, world, watched, units=False)


def fsdp_kept(rank: int, world: int, watched: bool) -> Result:
    """Weights that stay whole between forward and backward."""
    return fsdp(rank, world, watched, reshard=False)


def fsdp_accumulating(rank: int, world: int, watched: bool) -> Result:
    """Two micro-batches a step: the whole weight is gathered twice."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    for unit in (*model.blocks, model.lm_head, model):
        fully_shard(unit)
    return run(model, rows_of(rank, world), world, watched=watched, micro=2)


def fsdp_tied(rank: int, world: int, watched: bool) -> Result:
    """The head is the embedding: one unit, one parameter."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    model.lm_head.weight = model.embedding.weight
    for unit in (*model.blocks, model):
        fully_shard(unit)
    return run(model, rows_of(rank, world), world, watched=watched)


def alone_tied() -> Result:
    """The truth of it."""
    model = model_of()
    model.lm_head.weight = model.embedding.weight
    return run(model, [data(step) for step in range(STEPS)], 1.0, watched=True)


def fsdp_offloaded(rank: int, world: int, watched: bool) -> Result:
    """Parameters rest on the host; without an accelerator that is where they are anyway."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = model_of()
    for unit in (*model.blocks, model.lm_head, model):
        fully_shard(unit, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return run(model, rows_of(rank, world), world, watched=watched)


def fsdp_bfloat16(rank: int, world: int, watched: bool) -> Result:
    """Mixed precision: parameters in bfloat16."""
    return fsdp(rank, world, watched, dtype=torch.bfloat16)


def hsdp(rank: int, world: int, watched: bool) -> Result:
    """`fully_shard` over a mesh of two axes: replicated and sharded."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    return run(model, rows_of(rank, world), world, watched=watched)


def parallelized(model: Model, mesh: DeviceMesh, how: str) -> Model:
    """Tensor parallel blocks and head."""
    split = Shard(1) if how == "sequence" else Replicate()
    plan: dict[str, Any] = {}
    for i in range(2):
        plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=split)
        plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=split)
    if how == "sequence":
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=split)
        plan["norm"] = SequenceParallel()
    plan["lm_head"] = {
        "gathered": ColwiseParallel(output_layouts=Replicate()),
        "dtensor": ColwiseParallel(use_local_output=False),
        "local": ColwiseParallel(),
        "sequence": ColwiseParallel(input_layouts=split, use_local_output=False),
    }[how]
    parallelized: Model = parallelize_module(model, mesh, plan)  # type: ignore[assignment]
    return parallelized


def tensor_parallel(rank: int, world: int, watched: bool, how: str, **options: Any) -> Result:
    """Column-parallel head, with whole or split logits."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    settings = {name: options.pop(name) for name in ("bias", "padding") if name in options}
    model = parallelized(model_of(**settings), mesh, how)
    if how == "local":
        model.register_forward_hook(_gather(mesh))
    context = loss_parallel if how in ("dtensor", "sequence") else contextlib.nullcontext
    return run(model, [data(step) for step in range(STEPS)], 1.0, watched=watched, loss_context=context, **options)


def with_bias(rank: int, world: int, watched: bool) -> Result:
    """A head with a bias, which is split like its rows."""
    return tensor_parallel(rank, world, watched, "dtensor", bias=True)


def padded(rank: int, world: int, watched: bool) -> Result:
    """A head padded to 64 rows, so that the last of four ranks has padding alone."""
    return tensor_parallel(rank, world, watched, "dtensor", bias=True, padding=11, vocabulary=VOCABULARY)


def hidden(rank: int, world: int, watched: bool) -> Result:
    """Every layer is watched."""
    return tensor_parallel(rank, world, watched, "dtensor", layers=["unembedding", "blocks.*"], spectra=True)


def _gather(mesh: DeviceMesh) -> Any:
    """The loss of a head whose plain outputs are a part of the vocabulary needs them all."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = torch.Size((*output.shape[:-1], VOCABULARY))
        stride = (LENGTH * VOCABULARY, VOCABULARY, 1)
        return DTensor.from_local(output, mesh, [Shard(2)], run_check=False, shape=shape, stride=stride).full_tensor()

    return hook


def fsdp_and_tensor_parallel(rank: int, world: int, watched: bool) -> Result:
    """A mesh of 2 x 2: `fully_shard` over the first axis, DTensor over the second."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = parallelized(model_of(), mesh["tp"], "dtensor")
    for unit in (*model.blocks, model.lm_head, model):
        fully_shard(unit, mesh=mesh["dp"])
    batches = rows_of(mesh["dp"].get_local_rank(), 2)
    return run(model, batches, 2, watched=watched, loss_context=loss_parallel)


def data_and_tensor_parallel(rank: int, world: int, watched: bool, layers: Any = "unembedding") -> Result:
    """A mesh of 2 x 2 without a wrapper for the first axis: gradients are averaged by hand, and `mesh` says so."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = parallelized(model_of(), mesh["tp"], "gathered")
    batches = rows_of(mesh["dp"].get_local_rank(), 2)
    after = _average(mesh["dp"])
    return run(model, batches, 2, watched=watched, mesh=mesh["dp"], after_backward=after, layers=layers)


def context_parallel(rank: int, world: int, watched: bool) -> Result:
    """A mesh of 2 x 2: sequences over the first axis, positions over the second."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
    batches = rows_of(mesh["dp"].get_local_rank(), 2)
    batches = positions_of(mesh["cp"].get_local_rank(), world // 2, batches)
    return run(model_of(), batches, world, watched=watched, mesh=mesh, after_backward=_average(mesh["dp"], mesh["cp"]))


def _average(*meshes: DeviceMesh) -> Any:
    def after(model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            for mesh in meshes:
                torch.distributed.all_reduce(grad, group=mesh.get_group())
                grad /= mesh.size()

    return after


def zero3(rank: int, world: int, watched: bool, whole: bool) -> Result:
    """DeepSpeed with parameters, gradients and optimizer state over all ranks; the engine or its model is watched."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    import deepspeed

    model = model_of()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    result: Result = {"told": [], "readings": []}
    monitor = logalign.watch(engine if whole else engine.module, every=1) if watched else None
    for step, (ids, labels) in enumerate(rows_of(rank, world)):
        loss = summed_loss(engine(ids, labels=labels), labels) / _COUNTS[step] * world
        engine.backward(loss)
        engine.step()
        if monitor is not None:
            found = monitor.step(loss=loss)
            assert found is not None
            result["readings"].append(readings_of(found))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        result["weights"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if monitor is not None:
        monitor.close()
    return result


def transformers_plan(rank: int, world: int, folder: Path, split: bool) -> dict[str, Any]:
    """A Llama of Transformers, loaded as its own tensor-parallel plan has it, or whole."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    options = {}
    if split:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():  # as a launcher sets them
            os.environ[name] = str(value)
        options["distributed_config"] = DistributedConfig(tp_size=world, tp_plan="auto")
    model = LlamaForCausalLM.from_pretrained(folder, **options)
    model.train()
    ids, labels = data(0)
    with logalign.watch(model, every=1) as monitor:
        model(input_ids=ids, labels=labels).loss.backward()
        found = monitor.step()
    assert found is not None
    head = model.lm_head.weight
    return {"readings": readings_of(found), "split": isinstance(head, DTensor), "seen": tuple(head.shape)}


def save_llama(folder: Path) -> None:
    """A tiny one, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 11,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class FirstStage(nn.Module):
    """Embedding and the first block."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embedding, self.block = model.embedding, model.blocks[0]

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, n]."""
        x: Tensor = self.block(self.embedding(ids))
        return x


class LastStage(nn.Module):
    """The second block, norm and head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.block, self.norm, self.lm_head = model.blocks[1], model.norm, model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n] to [B, T, m]."""
        logits: Tensor = self.lm_head(self.norm(self.block(x)))
        return logits


def pipeline(rank: int, world: int, watched: bool) -> Result:
    """Two stages, two micro-batches; the loss is in the schedule, so the mask is given by the user."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    whole = model_of()
    model = FirstStage(whole) if rank == 0 else LastStage(whole)
    stage = PipelineStage(model, rank, world, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    counts = {"now": 1}
    schedule = ScheduleGPipe(
        stage,
        n_microbatches=2,
        loss_fn=lambda logits, labels: summed_loss(logits, labels) / counts["now"],
        scale_grads=False,
    )
    result: Result = {"readings": []}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monitor = logalign.watch(stage, every=1) if watched else None
        for step in range(STEPS):
            ids, labels = data(step)
            counts["now"] = _COUNTS[step]
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(ids)
            else:
                if monitor is not None:
                    monitor.mask(labels != -100)
                schedule.step(target=labels)
            optimizer.step()
            if monitor is not None:
                found = monitor.step()
                assert (found is None) == (rank == 0)
    result["weights"] = whole_weights(model)
    result["told"] = [str(each.message) for each in told if "logalign" in str(each.message)]
    if monitor is not None:
        result["readings"] = [readings_of(each) for each in monitor.readings]
        monitor.close()
    return result


def resumed(rank: int, world: int, folder: Path) -> Result:
    """A run that stops after half of its steps, is begun again, and a monitor's state that is saved and loaded."""
    import torch.distributed.checkpoint as checkpoint

    model = nn.parallel.DistributedDataParallel(model_of())
    batches = rows_of(rank, world)
    half = STEPS // 2
    with logalign.watch(model, every=1, run=folder) as monitor:
        for ids, labels in batches[:half]:
            model(ids, labels=labels).sum().backward()
            monitor.step()
    with logalign.watch(model, every=1, run=folder, resume=True) as monitor:
        for ids, labels in batches[half:]:
            model(ids, labels=labels).sum().backward()
            monitor.step()
        state = monitor.state_dict()
        checkpoint.save({"monitor": state}, checkpoint_id=folder.parent / "checkpoint")
    with logalign.watch(model, every=1) as other:
        loaded = {"monitor": other.state_dict()}
        checkpoint.load(loaded, checkpoint_id=folder.parent / "checkpoint")
        other.load_state_dict(loaded["monitor"])
        restored = other.state_dict()
    recorded = logalign.open_run(folder).readings
    return {
        "steps": [each.step for each in recorded],
        "tokens_seen": recorded[-1].tokens_seen,
        "state": state,
        "restored": restored,
    }


def group_after_watch(rank: int, world: int) -> None:
    """The process group comes up between watch() and the first step."""
    meeting = torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.destroy_process_group()
    model = model_of()
    monitor = logalign.watch(model, every=1)
    store = torch.distributed.PrefixStore("again", meeting)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ids, labels = data(0)
    model(ids, labels=labels).sum().backward()
    monitor.step()


def other_layers(rank: int, world: int) -> None:
    """Ranks that watch different layers."""
    model = nn.parallel.DistributedDataParallel(model_of())
    monitor = logalign.watch(model, every=1, layers=["unembedding", f"module.blocks.{rank}.up"])
    ids, labels = data(0)
    model(ids, labels=labels).sum().backward()
    monitor.step()


def overlapping_mesh(rank: int, world: int) -> None:
    """The user calls the ranks that share the weight ranks with tokens of their own."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model = parallelized(model_of(), mesh, "gathered")
    logalign.watch(model, every=1, mesh=mesh)
    model(data(0)[0])


def shards_unknown_at_watch(rank: int, world: int) -> None:
    """The model is parallelized after watch()."""
    model = model_of()
    logalign.watch(model, every=1)
    parallelized(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), "gathered")
    model(data(0)[0])


def unwrapped(rank: int, world: int) -> Result:
    """Data parallelism by hand, of which the monitor is not told."""
    model = model_of()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with logalign.watch(model, every=1) as monitor:
            ids, labels = rows_of(rank, world)[0]
            model(ids, labels=labels).sum().backward()
            found = monitor.step()
    assert found is not None
    return {"told": [str(each.message) for each in told], "tokens_offered": found.main.tokens_seen}


def wrong_mesh(rank: int, world: int) -> None:
    """A mesh that is none."""
    logalign.watch(model_of(), mesh="dp")  # type: ignore[arg-type]


def split_inputs(rank: int, world: int) -> None:
    """Inputs that are a slice of the sequence while the outputs are whole, as some stacks have it."""

    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.cat([input, input], dim=1))

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Head(WIDTH, VOCABULARY))
    logalign.watch(model, every=1, layers="1")
    model(torch.randn(2, 3, WIDTH))
