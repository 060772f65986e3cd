"""torchtitan's Llama 3, made small, on Python's own source, on one CPU: python examples/torchtitan_small.py

torchtitan 0.3 has no CPU among its devices: `on_cpu()` gives it one, and is no part of a training on GPUs. There the
function `small()` stands in a config registry, and torchtitan's own command runs it.
"""

import os
import socket
import sysconfig
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import torch


def on_cpu():
    """One process, and a CPU where torchtitan looks for an accelerator; before torchtitan is imported."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
    os.environ |= {**address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch._utils._get_available_device_type = lambda: "cpu"
    torch.cpu.current_device = lambda: 0
    torch.cpu.get_device_name = lambda _=None: "cpu"
    torch.cpu.get_device_properties = lambda _=None: types.SimpleNamespace(total_memory=2**30)
    torch.cpu.memory_stats = lambda _=None: {}
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda *_: None


on_cpu()

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402


class Bytes(BaseTokenizer):
    """A byte is a token."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to set."""

    def __init__(self, config, **_):
        super().__init__()

    def encode(self, text, **_):
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, tokens, **_):
        """The text of bytes."""
        return bytes(tokens).decode(errors="replace")

    def get_vocab_size(self):
        """As many as there are bytes."""
        return 256


class StandardLibrary(BaseDataLoader):
    """Random pieces of Python's own source."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Nothing to set."""

    def __init__(self, config, *, seq_len, local_batch_size, dp_rank, **_):
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
        self._data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._shape = (local_batch_size, seq_len)
        self._generator = torch.Generator().manual_seed(dp_rank)

    def __iter__(self):
        size, length = self._shape
        positions = torch.arange(length).repeat(size, 1)
        while True:
            starts = torch.randint(len(self._data) - length - 1, (size,), generator=self._generator)
            rows = torch.stack([self._data[start : start + length + 1] for start in starts])
            yield {"input": rows[:, :-1], "positions": positions}, rows[:, 1:].contiguous()

    def state_dict(self):
        """Where the loader is."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state):
        """Go on there."""
        self._generator.set_state(state["generator"])


def small():
    """torchtitan's debug model with two layers."""
    from logalign.integrations.torchtitan import watched

    config = llama3_debugmodel()
    config.dump_folder = tempfile.mkdtemp(prefix="torchtitan")
    config.tokenizer, config.dataloader = Bytes.Config(), StandardLibrary.Config()
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training.steps, config.training.local_batch_size, config.training.seq_len = 60, 4, 64
    config.training.mixed_precision_param = "float32"
    config.metrics.enable_tensorboard = True
    config.validator.enable = False
    config.training.disable_cuda_graphs = True
    return watched(config, every=10)


def main():
    """Train, and print what the monitor saw."""
    trainer = small().build()
    trainer.train()
    for readings in trainer.monitor.readings:
        print(f"step {readings.main.step:3}: loss {readings.main.loss:.3f}, LAR {readings.main.lar:.4f}")
    print(f"verdict: {trainer.monitor.verdict.outcome}; curves and run in {trainer.config.dump_folder}")
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
