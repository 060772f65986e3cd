"""LAR of a checkpoint's layers on a text, in a model that Transformers loads from the disk in eval mode.

The module downloads nothing and runs no code from a checkpoint. It pools the energies of all windows of the text, in
float32 arithmetic for every stored dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logalign.checkpoints.spectrum import WeightSpectrum
from logalign.common.extras import load
from logalign.errors import CheckpointError, InputError
from logalign.mathematics.energies import Energies
from logalign.mathematics.spectrum import spectra_of_grams
from logalign.runs.reading import UNEMBEDDING, finite

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOW = 512
"""Most tokens that the model processes at a time."""
TOKENS = 16_384
"""Default number of tokens of the text."""
CHARACTERS_A_TOKEN = 32
LOGITS = 1 << 26
"""Logits of one forward: 256 MiB in float32."""
WIDEST = 4096
"""Largest fan-in for the spectrum of the head's inputs, an eigendecomposition of [n, n]."""


@dataclass(frozen=True, kw_only=True)
class OnText:
    """The results of one layer on the text.

    Attributes:
        energies: Energies over all tokens.
        input_participation: d_q, for the head only.
        coherence: c, for the head only.
    """

    energies: Energies
    input_participation: float | None = None
    coherence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to run through checkpoints.

    Attributes:
        file: Its file, in UTF-8.
        model: A folder with the tokenizer, and config.json where a checkpoint has none. None uses each checkpoint's.
        tokens: The most tokens of the text to use.
    """

    file: Path
    model: Path | None = None
    tokens: int = TOKENS

    def through(self, checkpoint: Path, weights: Iterable[WeightSpectrum]) -> dict[str, OnText]:
        """Run the text through a checkpoint and return the results of its layers, by site.

        Args:
            checkpoint: A folder that Transformers loads as a causal language model.
            weights: The requested weights. The method skips a weight of no linear layer, such as an embedding.

        Raises:
            CheckpointError: Transformers cannot load the model or the tokenizer from there, or weights are missing.
            InputError: the text is not readable or too short, or has tokens that the model does not have.
            MissingExtraError: Transformers is not installed.
        """
        if self.tokens < 2:
            raise InputError(f"tokens: expected 2 or more, found {self.tokens}")
        load("transformers", extra="transformers", purpose="LAR on a text", supported="5.0,6.0")
        ids = self._ids(self.model or checkpoint)
        model = _model(checkpoint, self.model)
        vocabulary = model.get_input_embeddings().num_embeddings
        if int(ids.max()) >= vocabulary:
            raise InputError(
                f"{self.file}: expected tokens below {vocabulary}, the rows of the model's embedding, found "
                f"{int(ids.max())}; give the model's own tokenizer with --model"
            )
        return _measured(model, ids, weights)

    def _ids(self, folder: Path) -> Tensor:
        import torch
        from transformers import AutoTokenizer

        try:
            with self.file.open(encoding="utf-8") as opened:
                text = opened.read(self.tokens * CHARACTERS_A_TOKEN)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.file}: expected a text file in UTF-8, found: {error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # any error in the files, from any library that reads them
            raise _not_loaded(folder, "a tokenizer", error, "name a folder with one by --model") from error
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: self.tokens]
        if len(ids) < 2:
            raise InputError(f"{self.file}: expected a text of 2 tokens or more, found {len(ids)}")
        return torch.tensor(ids)


def _model(checkpoint: Path, named: Path | None) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = checkpoint / "config.json"
    if not checkpoint.is_dir() or not (own.is_file() or named):
        raise CheckpointError(
            f"{checkpoint}: expected a folder that Transformers loads (config.json beside safetensors files), found "
            f"{'no config.json; name a folder with one by --model' if checkpoint.is_dir() else 'a file'}"
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(checkpoint if own.is_file() else named or checkpoint, **local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, **local
        )
    except Exception as error:  # as above
        raise _not_loaded(checkpoint, "a causal language model", error, "leave out --text") from error
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint}: expected all weights of {type(model).__name__}, found {len(missing)} missing or of another "
            f"shape ({', '.join(map(str, missing[:3]))})"
        )
    return model.eval()


def _not_loaded(folder: Path, what: str, error: Exception, advice: str) -> CheckpointError:
    first = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(
        f"{folder}: expected {what} that Transformers loads from the disk, without code of its own, found: {first}; "
        f"{advice}"
    )


def _measured(model: Any, ids: Tensor, weights: Iterable[WeightSpectrum]) -> dict[str, OnText]:
    import torch

    from logalign.torch.meter import Meter, unpack
    from logalign.torch.module_map import linear_map

    meters: dict[str, Meter] = {}
    handles = []

    def watch(site: str, module: nn.Module) -> None:
        mapped = linear_map(module)
        if mapped is None:
            return
        mapped.name = site
        is_head = site == UNEMBEDDING
        spectral = is_head and mapped.shape[1] <= WIDEST
        meter = meters[site] = Meter(mapped.shape, mapped.device, spectral=spectral, softmax=is_head)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs, outputs = mapped.seen(args[0] if args else kwargs["input"], output)
            meter.add(mapped, inputs, outputs=outputs, bias=mapped.bias)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    modules = dict(model.named_modules())
    for weight in weights:
        module = model.get_output_embeddings() if weight.site == UNEMBEDDING else _named(modules, weight.name)
        if module is not None:
            watch(weight.site, module)
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW, len(ids))
    whole = len(ids) // window * window
    together = max(1, LOGITS // (window * model.config.get_text_config().vocab_size))
    batches = [*torch.split(ids[:whole].view(-1, window), together), *([ids[None, whole:]] if whole < len(ids) else [])]
    try:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for site, meter in meters.items():
        packed = meter.pack()
        energies, _, _ = unpack(packed, packed.vector.numpy())
        if energies.tokens == 0:
            continue  # a layer that this model does not use on a text
        spectra = None if meter.grams is None else spectra_of_grams(*meter.grams)
        found[site] = OnText(
            energies=energies,
            input_participation=None if spectra is None else finite(spectra.input_participation),
            coherence=None if spectra is None else finite(spectra.coherence),
        )
    return found


def _named(modules: dict[str, nn.Module], tensor: str) -> nn.Module | None:
    """Find the module of a weight tensor, where a checkpoint of only the body has names without the model's prefix."""
    name = tensor.removesuffix(".weight")
    if name in modules:
        return modules[name]
    longer = [module for full, module in modules.items() if full.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None
