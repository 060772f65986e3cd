"""A GPT of Megatron-core on Python's own source, on one CPU: python examples/megatron_small.py

Megatron-core is made for GPUs: `on_cpu()` gives it one process and a CPU, and is no part of a training on GPUs.
"""

import os
import socket
import sysconfig
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig

from logalign.integrations.megatron import watch

LENGTH, BATCH, STEPS, BYTES, PADDED = 64, 16, 100, 256, 384


def on_cpu():
    """One process, and the CPU where Megatron-core asks for the current GPU."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
    os.environ |= {**address, "RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo")
    random.initialize_rng_tracker(inference_rng_tracker=True)


def batches():
    """Bytes of the standard library, labels, and a loss mask without white space that begins a line."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[start : start + LENGTH + 1] for start in starts])
        ids, labels = rows[:, :-1], rows[:, 1:]
        mask = ((labels != ord(" ")) | (ids != ord(" "))).float()
        yield ids, labels * mask.long(), mask


def model_of():
    """Two layers, 64 wide; the vocabulary of 256 bytes padded to 384 rows."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    layer = get_gpt_layer_local_spec(normalization="LayerNorm")
    return GPTModel(config, layer, vocab_size=PADDED, max_sequence_length=LENGTH)


def main():
    """Train, and print what the monitor sees."""
    on_cpu()
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    monitor = watch(model, vocabulary=BYTES, every=10)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    later = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    for _, (ids, labels, loss_mask) in zip(range(STEPS), batches(), strict=False):
        losses = model(ids, positions, later, labels=labels, loss_mask=loss_mask)
        loss = (losses * loss_mask).sum() / loss_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        readings = monitor.step(loss=loss)
        if readings is not None:
            main = readings.main
            print(f"step {main.step:3}: loss {main.loss:.3f}, LAR {main.lar:.4f}, kept {main.kept:.2f}")
    monitor.close()
    print(f"verdict: {monitor.verdict.outcome}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
