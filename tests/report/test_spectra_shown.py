import numpy as np
from safetensors.numpy import save_file

from logalign.report.spectra_shown import NUMBERS, POINTS, shown_spectra


def save(run, step: int, *sites: str, n: int = 64) -> None:
    folder = run.path / "spectra"
    folder.mkdir(exist_ok=True)
    p = np.arange(n, 0, -1.0)
    vectors = {}
    for site in sites:
        vectors |= {f"{site}.p": p / p.sum(), f"{site}.q": np.full(n, 1 / n) + 0.0 * step}
    save_file(vectors, folder / f"step-{step:08d}.safetensors")


def test_spectra_are_shown_as_they_were_saved(write_run):
    run = write_run()
    save(run, 0, "unembedding")
    save(run, 100, "unembedding", "blocks.0")
    shown = shown_spectra(run, "unembedding")
    assert shown.steps == [0, 100]
    assert list(shown.sites) == ["unembedding", "blocks.0"]
    i, p, q = shown.sites["unembedding"][100]
    # Every direction of the first few, evenly in the logarithm beyond, the last included.
    assert i[:5].tolist() == [1, 2, 3, 4, 5]
    assert i[-1] == 64
    np.testing.assert_allclose(p, (65 - i) / 2080)
    np.testing.assert_allclose(q, 1 / 64)
    assert list(shown.sites["blocks.0"]) == [100]


def test_many_steps_layers_and_directions_are_thinned_evenly(write_run):
    run = write_run()
    sites = ["unembedding", *(f"blocks.{i}" for i in range(20))]
    for step in range(0, 1_000, 10):
        save(run, step, *sites, n=3_000)
    shown = shown_spectra(run, "unembedding")
    assert (shown.recorded, shown.steps[0], shown.steps[-1]) == (100, 0, 990)
    assert len(np.unique(np.diff(shown.steps))) <= 2
    assert shown.left_out == 9
    numbers = [2 * len(i) for at in shown.sites.values() for i, _, _ in at.values()]
    assert sum(numbers) <= NUMBERS
    assert max(numbers) <= 2 * POINTS


def test_damaged_files_are_named_and_others_shown(write_run):
    run = write_run()
    save(run, 0, "unembedding")
    save(run, 10, "unembedding")
    (run.path / "spectra" / "step-00000005.safetensors").write_bytes(b"\x08half")
    (run.path / "spectra" / "step-00000020.safetensors").write_bytes(b"")
    (run.path / "spectra" / "notes.txt").write_text("not spectra")
    shown = shown_spectra(run, "unembedding")
    assert shown.steps == [0, 10]
    assert shown.damaged == ["step-00000005.safetensors", "step-00000020.safetensors"]


def test_a_run_without_spectra_has_none(write_run):
    run = write_run()
    assert shown_spectra(run, "unembedding") is None
    (run.path / "spectra").mkdir()
    assert shown_spectra(run, "unembedding") is None
    (run.path / "spectra" / "step-00000005.safetensors").write_bytes(b"damage")
    assert shown_spectra(run, "unembedding") is None
